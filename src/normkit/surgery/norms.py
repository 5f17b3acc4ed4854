"""Reading an activation norm of any make as data: which statistic, over which axes, with which parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm
from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.activations.sync_batch_norm import SyncBatchNorm
from normkit.core.errors import SurgeryError
from normkit.core.moments import accumulation_dtype
from normkit.core.support import show
from normkit.engine.layer import Layer
from normkit.surgery.changes import label
from normkit.surgery.probe import probe

# Channels first, channels last, or several trailing axes, each element with a weight of its own.
Axes = Literal["n c *", "n * c", "trailing"]

_BASES = {
    "batch_norm": nn.modules.batchnorm._BatchNorm,
    "instance_norm": nn.modules.instancenorm._InstanceNorm,
    "group_norm": nn.GroupNorm,
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
}
_RANKED = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d),
}
_OURS = (BatchNorm, SyncBatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm)
_FORWARDS = [nn.SyncBatchNorm.forward, *(base.forward for base in _BASES.values())]


@dataclass(frozen=True)
class Norm:
    """An activation norm as data.

    Args:
        kind: the method's name in the catalogue.
        axes: of its input.
        shape: of the axes that hold channels or features; one number unless ``axes`` is ``"trailing"``.
        eps: None stands for the machine epsilon.
        weight: the gain, one value a channel, or None.
        bias: likewise.
        has_bias: whether its class knows a bias at all.
        option: number of groups of a group norm, ``over`` of a layer or RMS norm on channels first, else "".
        momentum: of running statistics.
        tracks: whether it keeps running statistics.
        running: those of a batch norm by name: mean, variance, count.
        note: what was found out about it that its class does not say.
        spatial: axes of positions where its class takes one rank alone, else None.
    """

    kind: str
    axes: Axes
    shape: tuple[int, ...]
    eps: float | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    has_bias: bool = True
    option: str = ""
    momentum: float | None = 0.1
    tracks: bool = False
    running: dict[str, Tensor | None] = field(default_factory=dict)
    note: str = ""
    spatial: int | None = None

    @property
    def channels(self) -> int:
        """How many channels or features share one statistic's axes."""
        return self.shape[0]

    def guard(self, dtype: torch.dtype) -> float:
        """The eps as a number."""
        return torch.finfo(accumulation_dtype(dtype)).eps if self.eps is None else self.eps


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an activation norm: of torch, of normkit, or by the looks of it.

    By its looks: it has no children, "norm" in its class's name, and tensors of one axis alone, as a norm's weight is.
    """
    if isinstance(module, tuple(_BASES.values())):
        return True
    if next(module.children(), None) is not None or "norm" not in type(module).__name__.lower():
        return False
    if type(module).__module__.startswith("normkit.") and not isinstance(module, Layer):
        return False  # stands beside a norm, as response normalization does
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    dims = [tensor.dim() for tensor in own if not is_lazy(tensor)]
    return max(dims, default=0) == 1


def read_norm(name: str, module: nn.Module) -> Norm:
    """Read an activation norm.

    Args:
        name: of the module, for messages.
        module: for which ``is_norm`` holds.

    Returns:
        The norm as data; its parameters are those of the module.

    Raises:
        SurgeryError: what the module computes is not known, or is more than a norm.
    """
    who = f"{label(name)} ({type(module).__name__})"
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise SurgeryError(f"{who}: its parameters have no size yet; run the model once on an example first")
    if parametrize.is_parametrized(module):
        raise SurgeryError(f"{who}: its weight is parametrized; bake the parametrization in with fold(model) first")
    activation = getattr(module, "activation", None)
    if isinstance(module, Layer) and activation is not None:
        raise SurgeryError(
            f"{who}: it applies {activation} too, which a new layer would lose; set its activation to None and put {activation} "
            "behind it"
        )
    if "forward" in vars(module):
        raise SurgeryError(
            f"{who}: its forward was replaced on the object, which a new layer would lose; undo that first"
        )
    hooks = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    if any(getattr(module, hook, None) for hook in hooks):
        raise SurgeryError(f"{who}: it has hooks on its state_dict, made for its own class; remove them first")
    kind = next((kind for kind, base in _BASES.items() if isinstance(module, base)), None)
    forward = type(module).forward
    ours = forward.__module__.startswith("normkit.")
    if kind is not None and (forward in _FORWARDS or ours):
        # Of another rule than the plain one, as in batches split into small ones: a kind of its own.
        return _known(type(module).__name__ if ours and not isinstance(module, _OURS) else kind, module, who)
    if kind in ("batch_norm", "instance_norm"):
        raise SurgeryError(
            f"{who}: its class overrides forward, and what it adds would be lost; choose other layers with where="
        )
    return _by_behaviour(module, who)


def _known(kind: str, module: nn.Module, who: str) -> Norm:
    weight, bias, eps = module.weight, getattr(module, "bias", None), module.eps
    assert weight is None or isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    assert eps is None or isinstance(eps, float | int)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        over = getattr(module, "over", None)
        axes: Axes = "n c *" if over else "n * c" if len(module.normalized_shape) == 1 else "trailing"
        shape = tuple(module.normalized_shape)
        note = ""
        offset = getattr(module, "offset", 0.0)
        if offset and weight is not None:
            weight, note = _from_zero(weight, offset), f"its gain was {offset:g} + weight"
        if getattr(module, "guard", "inside") != "inside":
            note += ("; " if note else "") + "eps now inside the root"
        if weight is not None and weight.dim() == 0:
            weight = _expanded(weight, shape)
            bias = None if bias is None else _expanded(bias, shape)
            note = "scalar weight spread over channels"
        has_bias = kind == "layer_norm" or bias is not None
        return Norm(kind, axes, shape, eps, weight, bias, has_bias, option=over or "", note=note)
    more = [key for key, parameter in module.named_parameters(recurse=False) if key not in ("weight", "bias")]
    channels_last = getattr(module, "layout", "n c *") == "n * c"
    count = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    assert isinstance(count, int)
    return Norm(
        kind,
        "n * c" if channels_last else "n c *",
        (count,),
        eps,
        weight,
        bias,
        option=str(module.num_groups) if isinstance(module, nn.GroupNorm) else "",
        momentum=getattr(module, "momentum", 0.1),
        tracks=getattr(module, "running_mean", None) is not None,
        running=dict(module._buffers) if isinstance(module, _BASES["batch_norm"]) else {},
        note=f"{', '.join(more)} dropped" if more else "",
        spatial=getattr(module, "spatial", next((n for n, of in _RANKED.items() if isinstance(module, of)), None)),
    )


def _by_behaviour(module: nn.Module, who: str) -> Norm:
    found = probe(module)
    if isinstance(found, str):
        raise SurgeryError(
            f"{who}: what it computes is not known: {found}; convert it by hand, or choose others with where="
        )
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own[found.weight], own[found.bias] if found.bias else None
    note = ""
    if found.offset:
        weight, note = _from_zero(weight, 1.0), "its gain was 1 + weight"
    axes: Axes = "n c *" if found.over else "n * c"
    return Norm(
        found.kind, axes, tuple(weight.shape), found.eps, weight, bias, bias is not None, option=found.over, note=note
    )


def _from_zero(weight: Tensor, offset: float) -> nn.Parameter:
    return nn.Parameter(weight.detach() + offset, requires_grad=weight.requires_grad)


def _expanded(scalar: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(scalar.detach().expand(shape).clone(), requires_grad=scalar.requires_grad)


def describe(module: nn.Module) -> str:
    """A norm on one line: its class and its sizes.

    >>> describe(nn.GroupNorm(2, 8)), describe(nn.LayerNorm(8, eps=1e-6)), describe(nn.Identity())
    ('GroupNorm(2, 8)', 'LayerNorm(8)', 'Identity()')
    """
    sizes: list[str] = []
    if isinstance(module, nn.GroupNorm):
        sizes = [str(module.num_groups), str(module.num_channels)]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = tuple(module.normalized_shape)
        sizes = [str(shape[0]) if len(shape) == 1 else show(shape)]
    elif not isinstance(module, nn.Identity):
        own = getattr(module, "weight", None)
        count = getattr(module, "num_features", own.numel() if isinstance(own, Tensor) else None)
        sizes = [] if count is None else [str(count)]
    if isinstance(module, Layer):
        told = {name: vars(module).get(name) for name in ("over", "per", "layout")}
        sizes += [f"{name}={value!r}" for name, value in told.items() if value not in (None, "n c *")]
    return f"{type(module).__name__}({', '.join(sizes)})"
