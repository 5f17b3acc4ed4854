"""How flax and keras name and lay out what they keep, and the constants with which frameworks make norms."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normkit.core.errors import OptionError, SurgeryError, check_options
from normkit.core.support import show
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.norms import describe, is_norm, norms_in, read_norm
from normkit.surgery.select import Where, choose
from normkit.surgery.transaction import transaction

Framework = Literal["torch", "timm", "flax", "keras"]

# Their names for torch's; where several become one, the first is what is written.
_LEAVES: dict[str, dict[str, str]] = {
    "flax": dict.fromkeys(("kernel", "scale", "embedding"), "weight") | {"mean": "running_mean", "var": "running_var"},
    "keras": dict.fromkeys(("kernel", "depthwise_kernel", "gamma", "scale", "embeddings"), "weight")
    | {"beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"},
}
_PACKED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_COLLECTIONS = ("params", "batch_stats")
_EPS: tuple[str, ...] = ("eps", "variance_epsilon", "epsilon")


class Constants(NamedTuple):
    """eps of batch norms, of RMS norms, of group norms and of the others, and the weight of the new running statistics."""

    batch: float
    rms: float | None
    group: float
    other: float
    momentum: float


CONSTANTS: dict[Framework, Constants] = {
    "torch": Constants(1e-5, None, 1e-5, 1e-5, 0.1),
    "timm": Constants(1e-5, 1e-6, 1e-5, 1e-6, 0.1),
    "flax": Constants(1e-5, 1e-6, 1e-6, 1e-6, 0.01),
    "keras": Constants(1e-3, 1e-6, 1e-3, 1e-3, 0.01),
}


def adopt(
    model: nn.Module,
    framework: Framework,
    *,
    where: Where = "all",
    eps: float | None = None,
    momentum: float | None = None,
) -> Changes:
    """Give norms the eps and momentum that another framework has, in place: checkpoints don't hold them.

    ==========  ==========  ==========  ==========  ==========  ==========================
    framework   BatchNorm   RMSNorm     GroupNorm   LayerNorm   momentum
    ==========  ==========  ==========  ==========  ==========  ==========================
    torch       1e-5        None        1e-5        1e-5        0.1, of the new statistic
    timm        1e-5        1e-6        1e-5        1e-6        0.1, of the new statistic
    flax        1e-5        1e-6        1e-6        1e-6        0.99, of the old one
    keras       1e-3        1e-6        1e-3        1e-3        0.99, of the old one
    ==========  ==========  ==========  ==========  ==========  ==========================

    A model here gets momentum 0.01 for a 0.99 of flax or keras.

    Args:
        model: any module.
        framework: ``"torch"``, ``"timm"``, ``"flax"`` or ``"keras"``.
        where: which norms, as in ``select``, by their names. Default: "all".
        eps: in place of the framework's default. Default: None.
        momentum: likewise, as the framework counts it. Default: None.

    Raises:
        OptionError: no such framework.
        NotationError: ``where`` can't be read.
        SurgeryError: no norm is chosen.

    >>> print(adopt(nn.Sequential(nn.BatchNorm2d(8), nn.LayerNorm(8)), "keras", momentum=0.9))
    layer  before          after           note
    0      BatchNorm2d(8)  BatchNorm2d(8)  eps 1e-05 -> 0.001
    1      LayerNorm(8)    LayerNorm(8)    eps 1e-05 -> 0.001
    """
    check_options("adopt", framework=(framework, Framework))
    if (momentum is not None and not 0 <= momentum <= 1) or (eps is not None and not eps >= 0):
        raise OptionError(f"adopt: momentum={momentum}, eps={eps}; wanted a momentum from 0 to 1 and an eps from 0")
    rows, usual = [], CONSTANTS[framework]
    with transaction(model) as opened:
        for name, module in choose(norms_in(model), where, "norms").items():
            kind = read_norm(name, module).kind
            family = "batch" if "batch" in kind else kind.partition("_")[0]
            own = eps if eps is not None else getattr(usual, family, usual.other)
            wanted: dict[str, float | None] = dict.fromkeys(_EPS, own)
            given = momentum if momentum is None or framework in ("torch", "timm") else 1 - momentum
            wanted["momentum"] = usual.momentum if given is None else round(given, 12)  # 1 - 0.99 is not quite 0.01
            notes = []
            for key, value in wanted.items():
                now = module.__dict__.get(key, value)  # one without it has nothing to change
                if now != value and (value is not None or isinstance(module, nn.RMSNorm)):  # which alone knows None
                    setattr(module, key, value)
                    notes.append(f"{key} {now} -> {value}")
            if notes:
                rows.append(Change(label(name), describe(module), describe(module), ", ".join(notes)))
        return opened.close(model, rows)


def from_framework(state: Mapping[Any, Any], framework: Framework) -> dict[str, tuple[str, Tensor]]:
    """A checkpoint's tensors by dotted names, each with its last part in the framework's words."""
    leaves, found = _LEAVES.get(framework, {}), {}
    for parts, value in _flat(state):
        parts = [part.removesuffix(":0") for part in parts]
        if framework == "flax" and parts[0] in _COLLECTIONS:
            parts = parts[1:]
        name = ".".join([*parts[:-1], leaves.get(parts[-1], parts[-1])]) if leaves else ".".join(parts)
        if name in found:
            raise SurgeryError(f"translate: {name} stands in the checkpoint twice")
        found[name] = parts[-1], value
    return found


def to_torch(layer: nn.Module | None, leaf: str, value: Tensor, name: str) -> Tensor:
    """A kernel as torch lays it out, (out, in, *positions), for the layer that it goes to; of attention, heads are joined."""
    if isinstance(layer, nn.Linear) and name.rpartition(".")[2] == "bias":
        return value.flatten()
    if leaf not in ("kernel", "depthwise_kernel"):
        return value
    if isinstance(layer, nn.Linear):
        heads = value
        if (
            value.dim() == 3
        ):  # (in, heads, size) of queries, keys and values, (heads, size, out) of what attention gives
            heads = value.flatten(1) if value.shape[0] == layer.in_features else value.flatten(0, 1)
        if heads.shape != (layer.in_features, layer.out_features):
            raise SurgeryError(
                f"translate: {name} has {show(value.shape)}, and the linear layer takes (in, out) = "
                f"({layer.in_features}, {layer.out_features}); flatten it to that"
            )
        return heads.t()
    if isinstance(layer, _ConvTransposeNd):
        raise SurgeryError(
            f"translate: {name} is of a transposed convolution, whose kernels frameworks lay out and flip in several ways; "
            "bring it to torch's (in, out, *positions), and call it weight"
        )
    if isinstance(layer, _ConvNd):
        value = value.movedim((-1, -2), (0, 1))  # (*positions, in, out)
        return value.transpose(0, 1).flatten(0, 1).unsqueeze(1) if leaf == "depthwise_kernel" else value
    if isinstance(layer, _PACKED):
        raise SurgeryError(
            f"translate: {name} is of {type(layer).__name__}, whose kernels frameworks pack in other orders; bring it to torch's "
            "(out, in), and call it as torch does"
        )
    return value


def to_framework(state: Mapping[str, Tensor], model: nn.Module, framework: Framework) -> dict[str, Tensor]:
    """A plain state_dict in another framework's names and layouts."""
    found = {}
    for key, value in state.items():
        prefix, _, name = key.rpartition(".")
        layer = model.get_submodule(prefix)
        if name == "num_batches_tracked":
            continue
        leaf, value = _to_leaf(layer, name, value, framework, key)
        parts = [*prefix.split("."), leaf] if prefix else [leaf]
        if framework == "flax":
            parts = [_COLLECTIONS[name.startswith("running_")], *parts]
        found["/".join(parts)] = value
    return found


def _to_leaf(layer: nn.Module, name: str, value: Tensor, framework: str, key: str) -> tuple[str, Tensor]:
    flax = framework == "flax"
    if name in ("running_mean", "running_var"):
        return next(theirs for theirs, ours in _LEAVES[framework].items() if ours == name), value
    if isinstance(layer, nn.Embedding):
        return "embedding" if flax else "embeddings", value
    if isinstance(layer, _ConvTransposeNd) and name == "weight":
        raise SurgeryError(f"translate: {key} is of a transposed convolution, which {framework} lays out in two ways")
    if isinstance(layer, _PACKED):
        raise SurgeryError(
            f"translate: {key} is of {type(layer).__name__}, whose kernels {framework} packs in another order"
        )
    if isinstance(layer, nn.Linear) and name == "weight":
        return "kernel", value.t()
    if isinstance(layer, _ConvNd) and name == "weight":
        return "kernel", value.movedim((0, 1), (-1, -2))
    if is_norm(layer) and name in ("weight", "bias"):
        centred = read_norm(key, layer).kind != "rms_norm"
        word = "scale" if flax or not centred else "gamma"
        return (word if name == "weight" else "bias" if flax else "beta"), value
    return name, value


def _flat(state: Mapping[Any, Any], *before: str) -> Iterator[tuple[list[str], Tensor]]:
    for key, value in state.items():
        parts = [*before, *(str(part) for part in (key if isinstance(key, tuple) else (key,)))]
        parts = [piece for part in parts for piece in part.replace("/", ".").split(".")]
        if isinstance(value, Mapping):
            yield from _flat(value, *parts)
        else:
            # By way of numpy, which flax and keras give; a copy, as jax's memory is not to be written.
            yield parts, value if isinstance(value, Tensor) else _tensor(value.__array__().copy(), ".".join(parts))


def _tensor(array: Any, name: str) -> Tensor:
    try:
        if array.dtype.name == "bfloat16":  # which numpy knows by another package, and torch not from numpy
            return torch.as_tensor(array.view("int16")).view(torch.bfloat16)
        return torch.as_tensor(array)
    except TypeError:
        raise SurgeryError(
            f"translate: {name} is of {array.dtype}, which torch has no tensor for; cast it first"
        ) from None
