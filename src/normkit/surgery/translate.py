"""Checkpoints from one form to another, in files too: weights plain, normalized or parametrized; those of flax and keras."""

import copy
import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike, fspath
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.errors import SurgeryError, check_options
from normkit.core.support import show
from normkit.surgery.bake import bake
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.framework import Framework, from_framework, to_framework, to_torch
from normkit.surgery.norms import loads_difference, norms_in, read_norm
from normkit.surgery.select import Where, choose
from normkit.surgery.transaction import transaction
from normkit.surgery.weight_forms import Known, translate_weight, weights_of

Rename = Callable[[str], str]
Path = str | PathLike[str]
To = Literal["model", "plain", "flax", "keras"]


def translate(
    state_dict: Mapping[Any, Any] | Path,
    model: nn.Module,
    *,
    source: Framework = "torch",
    to: To = "model",
    rename: Rename | None = None,
    from_one: Where | bool | None = None,
    save: Path | None = None,
) -> dict[str, Tensor]:
    """Give a checkpoint the keys that a model has, whatever form its weights were saved in; or give a model's to others.

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
    weight, is lost; one that forgets its raw weight's length, as equilibration, takes a plain weight as its raw one. Another
    parametrization's raw weight fits the same one alone. timm's ``gain`` is that of ``scaled_weight_standardization``.

    Of flax and keras, nested dicts or flat ones with ``/`` or ``.`` between the parts, norms and their layers are known:

    ================  =====================  ===============================
    here              flax                   keras
    ================  =====================  ===============================
    ``weight``        ``scale``              ``gamma``; ``scale`` of RMS
    ``bias``          ``bias``               ``beta``
    ``running_mean``  ``mean``               ``moving_mean``
    ``running_var``   ``var``                ``moving_variance``
    ``weight``        ``kernel``, (in, out) and (*positions, in, out), as of Linear and Conv
    ``weight``        ``embedding``          ``embeddings``
    ================  =====================  ===============================

    Their eps and momentum are in no checkpoint: see ``adopt``.

    Args:
        state_dict: of tensors or arrays; or the path of a file, of safetensors where it ends so, else one that ``torch.load``
            reads with ``weights_only=True``. It is not changed.
        model: whose ``load_state_dict`` is to take the result; it is not changed.
        source: who wrote the checkpoint: ``"torch"``, ``"timm"``, ``"flax"`` or ``"keras"``. Default: "torch".
        to: ``"model"`` for the model's keys; ``"plain"`` for those that it had without parametrizations; ``"flax"`` or
            ``"keras"``, flat with ``/``. Default: "model".
        rename: gives the model's name of each key, with dots and torch's last part, where the names differ too; of what goes
            out, the other's. Default: None.
        from_one: norms whose gain the other side keeps as gain - 1, as Gemma does: as in ``select``, by the model's names, or
            True for all, False for none. Default: None, those that do so in the model.
        save: path to write the result to, likewise. Default: None.

    Returns a state_dict with the model's keys, every one of them, in the model's order; or with those asked for.

    Raises:
        SurgeryError: a key that the model wants is not there in any form, one of the checkpoint is left over, a shape differs,
            a parametrization has no inverse, as ``Precondition``, two tensors are no lengths and directions, a transposed
            convolution meets flax or keras, or safetensors is not installed.
        OptionError: no such framework.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1, bias=False))
    >>> layer.weight = torch.tensor([[3.0, 4.0]])
    >>> translate(layer.state_dict(), nn.Linear(2, 1, bias=False))
    {'weight': tensor([[3., 4.]])}
    >>> translate(nn.Linear(1, 2).state_dict(), nn.Linear(1, 2), to="flax")["params/kernel"].shape
    torch.Size([1, 2])
    """
    check_options("translate", source=(source, Framework), to=(to, To))
    state = state_dict if isinstance(state_dict, Mapping) else read_checkpoint(state_dict)
    inward = to == "model"
    given = _read(state, model, source, rename if inward else None, from_one if inward else None)
    found, used = _translated(given, model)
    wanted = model.state_dict()
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
    result = {key: found[key] for key in wanted}
    if not inward:
        result = _outward(result, model, to, rename, from_one)
    if save is not None:
        write_checkpoint(save, result)
    return result


def accept(
    model: nn.Module, *, source: Framework = "torch", rename: Rename | None = None, from_one: Where | bool | None = None
) -> Changes:
    """Let a model's ``load_state_dict`` take what ``translate`` takes, in place: a hook translates each checkpoint first.

    So a conditioned, weight-normed or spectrally normed model loads plain checkpoints, and a plain one theirs; one that has the
    model's keys loads as before. With ``strict``, torch names the keys that are missing or left over.

    With ``from_one`` a state_dict of the model itself, whose gains are not to be moved again, is known by the metadata that
    torch keeps with it, also in files of ``torch.save``. Safetensors and plain dicts don't have it: ``undo()`` before those.

    Arguments and errors are those of ``translate``, but that missing and left over keys raise nothing; ``rename`` is a function
    of a module's top level, where the model is to be pickled.

    >>> from normkit import condition
    >>> model = condition(nn.Sequential(nn.Linear(2, 3))).model
    >>> changes = accept(model)
    >>> model.load_state_dict(nn.Sequential(nn.Linear(2, 3)).state_dict())
    <All keys matched successfully>
    """
    check_options("accept", source=(source, Framework))
    with transaction(model) as opened:
        model.register_load_state_dict_pre_hook(_Accept(source, rename, from_one))
        if from_one is not None:
            model.register_state_dict_post_hook(_mark_own)
        what = type(model).__name__
        return opened.close(model, [Change("(model)", what, what, f"loads {source} checkpoints of any form")])


_OWN = "normkit: gains as the model has them"  # among what torch notes along with a state_dict


def _mark_own(model: nn.Module, state: Any, prefix: str, about: dict[str, Any]) -> None:
    about[_OWN] = True


class _Accept:
    """The hook of ``accept``; an object, so that the model can be pickled."""

    def __init__(self, source: Framework, rename: Rename | None, from_one: Where | bool | None) -> None:
        self.how = source, rename, from_one

    def __call__(self, model: nn.Module, state: dict[Any, Any], prefix: str, about: Any, *rest: object) -> None:
        source, rename, from_one = self.how
        how = source, rename, None if about.get(_OWN) else from_one
        own = {key: state[key] for key in list(state) if not isinstance(key, str) or key.startswith(prefix)}
        given = _read({key[len(prefix) :] if prefix else key: value for key, value in own.items()}, model, *how)
        found, used = _translated(given, model)
        for key in own:
            del state[key]
        state.update({prefix + key: value for key, value in given.items() if key not in used})
        state.update({prefix + key: value for key, value in found.items()})


def _read(
    state: Mapping[Any, Any], model: nn.Module, source: Framework, rename: Rename | None, from_one: Where | bool | None
) -> Known:
    """A checkpoint by the model's names, laid out as torch does."""
    layers, given, known = dict(model.named_modules(remove_duplicate=False)), dict[str, Tensor](), model.state_dict()
    found = from_framework(state, source)
    for key, (leaf, value) in found.items():
        raw = f"{key.rpartition('.')[0]}.{leaf}".lstrip(".")
        name = (rename or str)(key)
        if rename is None and raw in known:
            name, leaf = raw, ""  # a parameter of that very name, as ConvNeXt's gamma
        layer = layers.get(name.rpartition(".")[0])
        given[name] = to_torch(layer, leaf, value, key) if source in ("flax", "keras") else value
    if len(given) != len(found):
        raise SurgeryError("translate: rename gives several keys one name")
    for prefix, offset in _offsets(model, from_one).items():
        if prefix + "weight" in given:
            given[prefix + "weight"] = given[prefix + "weight"] + offset
    return given


def _offsets(model: nn.Module, from_one: Where | bool | None) -> dict[str, float]:
    """What to add to the other side's gain of each norm, by its prefix."""
    if from_one is None:
        return {}
    norms = norms_in(model, every_name=True)
    theirs = choose(norms, from_one, "norms") if not isinstance(from_one, bool) else norms if from_one else {}
    found = {}
    for name, norm in norms.items():
        ours = loads_difference(norm) if parametrize.is_parametrized(norm) else read_norm(name, norm).offset
        found[f"{name}." if name else ""] = (name in theirs) - ours
    return {prefix: offset for prefix, offset in found.items() if offset}


def _outward(state: Known, model: nn.Module, to: To, rename: Rename | None, from_one: Where | bool | None) -> Known:
    """A model's own state_dict in plain keys, or in another framework's."""
    offsets = _offsets(model, from_one)
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    original, counted = "parametrizations.weight.original", dict[str, Tensor]()
    for name, layer in other.named_modules(remove_duplicate=False):
        if loads_difference(layer):
            counted[f"{name}.weight".lstrip(".")] = layer.get_parameter(original).detach()
    bake(other)
    found = {**other.state_dict(), **counted}
    for prefix, offset in offsets.items():
        if f"{prefix}weight" in found:
            found[f"{prefix}weight"] = found[f"{prefix}weight"] - offset
    if to in ("flax", "keras"):
        found = to_framework(found, other, to)
    renamed = {(rename or str)(key): value for key, value in found.items()}
    if len(renamed) != len(found):
        raise SurgeryError("translate: rename gives several keys one name")
    return renamed


def _translated(given: Known, model: nn.Module) -> tuple[Known, set[str]]:
    """What a checkpoint has for a model, by the model's keys, and which of its keys that took."""
    held: Known = model.state_dict(keep_vars=True)
    wanted = {key: value.detach() if isinstance(value, Tensor) else value for key, value in held.items()}
    found = {key: given[key] for key in wanted if key in given}
    used = set(found)
    for prefix, layer in model.named_modules(remove_duplicate=False):
        prefix = f"{prefix}." if prefix else ""
        for name in weights_of(layer):
            translate_weight(layer, prefix, name, given, wanted, found, used)
        count = f"{prefix}num_batches_tracked"
        if count in wanted:
            # Converted checkpoints lack the count, which only momentum=None reads.
            found.setdefault(count, wanted[count])
        elif f"{prefix}running_mean" in wanted:
            used.add(count)  # a frozen norm counts nothing
    by_tensor = {id(held[key]): value for key, value in found.items()}
    for key, value in held.items():  # of tied weights a file may hold one alone
        if key not in found and id(value) in by_tensor:
            found[key] = by_tensor[id(value)]
    return found, used


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") if keys else "none"


_ENDING = ".safetensors"


def read_checkpoint(path: Path) -> Mapping[Any, Any]:
    """The tensors in a file; nothing in it is run."""
    if fspath(path).endswith(_ENDING):
        return _safetensors().load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    held = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if held is None:
        raise SurgeryError(f"{fspath(path)}: wanted tensors by name; got a {type(found).__name__}")
    return held


def write_checkpoint(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors by name, each for itself where they share memory; a file that was there is whole until the new one is."""
    part = f"{fspath(path)}.part"
    try:
        if fspath(path).endswith(_ENDING):
            written = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
            _safetensors().save_file(written, part, metadata={"format": "pt"})
        else:
            torch.save(dict(state), part)
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(part)


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise SurgeryError(
            f"{_ENDING} files need safetensors, which is not installed; pip install safetensors"
        ) from None
