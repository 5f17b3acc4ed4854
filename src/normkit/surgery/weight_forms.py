"""The forms in which checkpoints keep a weight: plain, weight and spectral norm old and new, parametrized; each from each."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.errors import SurgeryError
from normkit.core.support import show
from normkit.surgery.changes import label
from normkit.surgery.norms import loads_difference
from normkit.weights.layout import weight_layout
from normkit.weights.parametrization import Parametrization

Known = dict[str, Tensor]


def weights_of(layer: nn.Module) -> list[str]:
    """The names of a layer's tensors, in whatever form it has them itself."""
    names = [key.removesuffix(end) for key in layer._parameters for end in ("_g", "_orig") if key.endswith(end)]
    lists = layer.parametrizations if parametrize.is_parametrized(layer) else ()
    return [*names, *lists, *(key for key in layer._parameters if not key.endswith(("_g", "_v", "_orig")))]  # pyright: ignore


def translate_weight(
    layer: nn.Module, prefix: str, name: str, given: Known, wanted: Known, found: Known, used: set[str]
) -> None:
    """Find one weight of a layer in a checkpoint, in whatever form it is there, and note the keys that it took."""
    # The same form under other keys, and nothing computed; then by way of the value.
    gain, scaled = f"{prefix}gain", _keys(prefix, name, _FORMS[1])
    if gain in wanted and scaled[0] in given:  # timm's scaled standardized convolution, from ours
        found[gain], found[prefix + name] = given[scaled[0]].view(wanted[gain].shape), given[scaled[1]]
        used.update(scaled)
        return
    if gain in given and gain not in wanted and scaled[0] in wanted and prefix + name in given:  # and the other way
        found[scaled[0]], found[scaled[1]] = given[gain].view(wanted[scaled[0]].shape), given[prefix + name]
        used.update((gain, prefix + name))
        return
    own = [_keys(prefix, name, form) for form in _FORMS]
    mine: list[str] = next((keys for keys in own if all(key in wanted for key in keys)), [])
    theirs: list[str] = next((keys for keys in own if all(key in given for key in keys)), [])
    if not theirs:
        return
    alike = bool(mine) and own.index(mine) // 2 == own.index(theirs) // 2
    # Lengths along another axis are other lengths.
    if alike and len(theirs) == 2 and given[theirs[0]].shape != wanted[mine[0]].shape:
        alike = not _are_lengths(given[theirs[0]], given[theirs[1]])
    if alike and all(key in found for key in mine):
        return
    used.update(theirs)
    if alike and len(mine) > 1:
        found.update({key: given[other] for key, other in zip(mine, theirs, strict=True)})
        return
    value = _value(layer, label(prefix + name), *(given[key] for key in theirs))
    other = len(mine) == 2 and not _are_lengths(wanted[mine[0]], wanted[mine[1]])
    if other and not parametrize.is_parametrized(layer, name):
        raise SurgeryError(f"translate: {label(mine[0])} and {label(mine[1])} are no lengths and directions")
    torchs = len(mine) > 1 and not other and not _known_here(layer, name)
    if torchs:
        _check_shape(value, wanted[mine[1 if len(mine) == 2 else 0]], label(prefix + name))
        like = wanted[mine[0]]
        fits = (_length(value, like) != 0).all() if like.shape != value.shape else value.any()
        if not value.is_meta and not fits:
            raise SurgeryError(
                f"translate: {label(prefix + name)} is zero, or has a zero row, of which torch's weight or spectral "
                "norm makes NaN; put normkit's on, or leave this layer out"
            )
    if loads_difference(layer):
        found[f"{prefix}parametrizations.{name}.original"] = value
    elif parametrize.is_parametrized(layer, name):
        raw = _raw(layer, name, value, label(prefix + name))
        found.update({f"{prefix}parametrizations.{name}.{key}": part for key, part in raw.items()})
    elif len(mine) < 2:
        found[f"{prefix}{name}"] = value
    elif len(mine) == 2:
        found[mine[0]], found[mine[1]] = _length(value, wanted[mine[0]]), value
    else:
        found[mine[0]] = value
        found.update({key: wanted[key] for key in mine[1:]})  # its own vectors, which iteration improves


def _raw(layer: nn.Module, name: str, value: Tensor, full: str) -> Known:
    """What a layer's parametrizations keep of a plain weight, so that they give it back, or all of it that they have room for."""
    held = copy.deepcopy(layer.get_submodule(f"parametrizations.{name}")).eval()
    assert isinstance(held, parametrize.ParametrizationList)
    like = next(chain(held.parameters(), held.buffers()))  # a buffer may be parametrized too
    if like.is_meta and any(True for _ in held.buffers()):
        raise SurgeryError(f"translate: {full}: its parametrization is on the meta device; give the model memory first")
    if like.is_meta:  # it is to be loaded with assign=True
        held = held.to_empty(device=value.device)
    value = value.to(next(chain(held.parameters(), held.buffers())))

    def gives(weight: Tensor) -> Tensor:
        try:
            held.right_inverse(weight)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise SurgeryError(f"translate: {full}: its parametrization takes no plain weight: {error}") from error
        return held()

    with torch.no_grad():
        _check_shape(value, held(), full)
        made = gives(value)
        # A spectral norm divides by what its vectors see, now and after they have moved.
        spectral = any(hasattr(part, "_u") for part in held.children())
        if value.is_meta or spectral or not value.isfinite().all() or _close(made, value):
            return held.state_dict()
        lengths = held._parameters.get("original0")
        if lengths is not None and lengths.dim() == 1:  # a gain per unit, which begins at 1
            rows, wanted = (weight_layout(layer, name).matrix(weight) for weight in (made, value))
            lengths.mul_((rows * wanted).sum(1) / rows.square().sum(1).clamp_min(_TINY))
            if _close(held(), value):
                return held.state_dict()
            made = gives(value)
        shift = gives(torch.zeros_like(value))  # a constant that is added
        if _close(gives(value - shift), value):
            return held.state_dict()
        if not _close(gives(made), made):
            # A method that forgets the length of its raw weight, as standardization, has the plain one for that.
            unit = value / value.abs().max()
            forgets = _close(gives(unit * 2**10), gives(unit * 2**13))  # so large that eps is nothing
            gives(value)
            if not forgets or not any(torch.equal(part, value) for part in held.state_dict().values()):
                parts = " and ".join(type(part).__name__ for part in held.children())
                raise SurgeryError(
                    f"translate: {full}: {parts} makes another weight of a plain one, and has no inverse; load the "
                    "checkpoint before that is put on, or the model's own keys"
                )
        gives(value)
        return held.state_dict()


def _close(weight: Tensor, wanted: Tensor) -> bool:
    """Up to some roundings of a sum over a row."""
    if not wanted.numel() or not wanted.isfinite().all():
        return not wanted.numel()
    return torch.allclose(weight, wanted, rtol=0, atol=64 * torch.finfo(weight.dtype).eps * float(wanted.abs().max()))


def _check_shape(value: Tensor, wanted: Tensor, full: str) -> None:
    if value.shape != wanted.shape:
        raise SurgeryError(f"translate: {full}: got {show(value.shape)}, the model wants {show(wanted.shape)}")


def _known_here(layer: nn.Module, name: str) -> bool:
    """Whether what makes a weight is normkit's, which floors lengths."""
    parts = layer.get_submodule(f"parametrizations.{name}") if parametrize.is_parametrized(layer, name) else ()
    return any(isinstance(part, Parametrization) for part in parts)  # pyright: ignore


def _are_lengths(g: Tensor, v: Tensor) -> bool:
    """Whether two tensors can be those of weight norm: one length, or one for each place along some axes and not all."""
    fits = g.dim() == v.dim() and all(a in (1, b) for a, b in zip(g.shape, v.shape, strict=True))
    return not g.dim() or (fits and 1 in g.shape)


_TINY = 1e-12  # the floor of a length
_FORMS = (
    ("{}_g", "{}_v"),
    ("parametrizations.{}.original0", "parametrizations.{}.original1"),
    ("{}_orig", "{}_u", "{}_v"),
    ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v"),
    ("{}",),
)


def _keys(prefix: str, name: str, form: tuple[str, ...]) -> list[str]:
    return [prefix + part.format(name) for part in form]


def _value(layer: nn.Module, full: str, first: Tensor, *rest: Tensor) -> Tensor:
    """The weight of a layer that a form stands for, in its dtype; computed in float64."""
    if not rest:
        return first
    if len(rest) == 1:
        if not _are_lengths(first, rest[0]):
            raise SurgeryError(
                f"translate: {full} is kept as two tensors, {show(first.shape)} and {show(rest[0].shape)}, that are no lengths "
                "and directions of weight norm; they fit the same parametrization alone: make that weight plain where it is"
            )
        wide = rest[0].double()
        return (first.double() * wide / _length(wide, first).clamp_min(_TINY)).to(first.dtype)
    u, v = (part.double() for part in rest)
    # The output axis: that of the layer's kind, or the one that was asked for.
    axis = int(isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))
    axes = sorted(range(first.dim()), key=lambda each: each != axis)
    matrices = (first.double().movedim(axis, 0).flatten(1) for axis in axes)
    matrix = next((each for each in matrices if each.shape == (u.numel(), v.numel())), None)
    if matrix is None:
        raise SurgeryError(f"translate: {full}: got {show(first.shape)}, and vectors of {u.numel()} and {v.numel()}")
    sigma = u @ matrix @ v
    return (first.double() / torch.where(sigma == 0, _TINY, sigma)).to(first.dtype)


def _length(value: Tensor, like: Tensor) -> Tensor:
    """Norms over the axes that a gain has not."""
    dims = [axis for axis in range(value.dim()) if like.dim() == 0 or like.shape[axis] == 1]
    return torch.linalg.vector_norm(value, dim=dims, keepdim=like.dim() > 0) if dims else value.abs()
