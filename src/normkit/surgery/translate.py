"""Checkpoints from one form of a weight to another: plain, weight norm old and new, spectral norm old and new, parametrized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.errors import SurgeryError
from normkit.core.support import show
from normkit.surgery.changes import label

_Known = dict[str, Tensor]


def translate(
    state_dict: Mapping[str, Tensor], model: nn.Module, *, rename: Callable[[str], str] | None = None
) -> dict[str, Tensor]:
    """Give a checkpoint the keys that a model has, whatever form its weights were saved in.

    ==========================  ==============================================================================
    form                        keys of a layer's ``weight``
    ==========================  ==============================================================================
    plain                       ``weight``
    weight norm, hooks          ``weight_g``, ``weight_v``
    weight norm                 ``parametrizations.weight.original0`` (g), ``original1`` (v)
    spectral norm, hooks        ``weight_orig``, ``weight_u``, ``weight_v``
    spectral norm               ``parametrizations.weight.original``, ``.0._u``, ``.0._v``
    another parametrization     ``parametrizations.weight.original``
    ==========================  ==============================================================================

    Each becomes each: a plain weight is given to a model's parametrizations by what they know as their inverse, and a normalized
    one becomes plain as g v / |v| or as W / (u W v). What a method has no room for, as the length of a spectrally normalized
    weight, is lost. Another parametrization's raw weight fits the same parametrization alone.

    Args:
        state_dict: of tensors, as ``torch.load(path, weights_only=True)`` or safetensors gives it; it is not changed.
        model: whose ``load_state_dict`` is to take the result; it is not changed.
        rename: gives the model's name of each key, where the names differ too. Default: None.

    Returns:
        A state_dict with the model's keys, every one of them, in the model's order.

    Raises:
        SurgeryError: a key that the model wants is not there in any form, one of the checkpoint is left over, or a shape differs.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1, bias=False))
    >>> layer.weight = torch.tensor([[3.0, 4.0]])
    >>> translate(layer.state_dict(), nn.Linear(2, 1, bias=False))
    {'weight': tensor([[3., 4.]])}
    """
    given = {(rename or str)(key): value for key, value in state_dict.items()}
    if len(given) != len(state_dict):
        raise SurgeryError("translate: rename gives several keys one name")
    wanted, found, used = dict(model.state_dict()), dict[str, Tensor](), set[str]()
    for key in wanted:
        if key in given:
            found[key] = given[key]
            used.add(key)
    for prefix, layer in model.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for name in _weights(layer):
            _translate_weight(layer, prefix, name, given, wanted, found, used)
    for key, value in wanted.items():
        if key.rpartition(".")[2] == "num_batches_tracked":
            found.setdefault(key, value)  # converted checkpoints lack the count, which only momentum=None reads
    missing, left = [key for key in wanted if key not in found], [key for key in given if key not in used]
    if missing or left:
        raise SurgeryError(
            f"translate: keys that the model wants and the checkpoint has in no form: {_some(missing)}; keys of the checkpoint "
            f"that have no place in the model: {_some(left)}; give rename=, or take out what is not wanted"
        )
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            raise SurgeryError(
                f"translate: {label(key)}: got {show(value.shape)}, the model wants {show(wanted[key].shape)}"
            )
    return {key: found[key] for key in wanted}


def _weights(layer: nn.Module) -> list[str]:
    """The names of a layer's tensors, in whatever form it has them itself."""
    names = [key.removesuffix(end) for key in layer._parameters for end in ("_g", "_orig") if key.endswith(end)]
    lists = layer.parametrizations if parametrize.is_parametrized(layer) else ()
    return [*names, *lists, *(key for key in layer._parameters if not key.endswith(("_g", "_v", "_orig")))]  # pyright: ignore


def _translate_weight(
    layer: nn.Module, prefix: str, name: str, given: _Known, wanted: _Known, found: _Known, used: set[str]
) -> None:
    # The same form under other keys, and nothing computed; then by way of the value.
    own = [_keys(prefix, name, form) for form in _FORMS]
    mine = next((keys for keys in own if all(key in wanted for key in keys)), None)
    if mine is not None and all(key in found for key in mine):
        return
    theirs = next((keys for keys in own if all(key in given for key in keys)), None)
    if theirs is None:
        return
    if mine is not None and own.index(mine) // 2 == own.index(theirs) // 2 and len(mine) > 1:
        found.update({key: given[other] for key, other in zip(mine, theirs, strict=True)})
    else:
        value = _value(*(given[key] for key in theirs))
        if parametrize.is_parametrized(layer, name):
            held = copy.deepcopy(layer.get_submodule(f"parametrizations.{name}"))
            assert isinstance(held, parametrize.ParametrizationList)
            with torch.no_grad():
                held.right_inverse(value.to(next(held.parameters()).dtype))
            found.update({f"{prefix}parametrizations.{name}.{key}": part for key, part in held.state_dict().items()})
        elif mine is None or len(mine) == 1:
            found[f"{prefix}{name}"] = value
        elif len(mine) == 2:
            found[mine[0]], found[mine[1]] = _length(value, wanted[mine[0]]), value
        else:
            found[mine[0]] = value
            found.update({key: wanted[key] for key in mine[1:]})  # its own vectors, which iteration improves
    used.update(theirs)


_FORMS = (
    ("{}_g", "{}_v"),
    ("parametrizations.{}.original0", "parametrizations.{}.original1"),
    ("{}_orig", "{}_u", "{}_v"),
    ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v"),
    ("{}",),
)


def _keys(prefix: str, name: str, form: tuple[str, ...]) -> list[str]:
    return [prefix + part.format(name) for part in form]


def _value(first: Tensor, *rest: Tensor) -> Tensor:
    """The weight that a form stands for, in its dtype; computed in float64."""
    if not rest:
        return first
    if len(rest) == 1:
        wide = rest[0].double()
        return (first.double() * wide / _length(wide, first)).to(first.dtype)
    u, v = (part.double() for part in rest)
    matrix = first.double().flatten(1)
    if u.numel() != matrix.shape[0]:  # of a transposed convolution the output axis is the second
        matrix = first.double().transpose(0, 1).flatten(1)
    return (first.double() / (u @ matrix @ v)).to(first.dtype)


def _length(value: Tensor, like: Tensor) -> Tensor:
    """Norms over the axes that a gain has not."""
    dims = [axis for axis in range(value.dim()) if like.dim() == 0 or like.shape[axis] == 1]
    return torch.linalg.vector_norm(value, dim=dims, keepdim=like.dim() > 0) if dims else value.abs()


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") if keys else "none"
