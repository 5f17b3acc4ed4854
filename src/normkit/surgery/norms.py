"""Reading an activation norm of any make as data: which statistic, over which axes, with which parameters."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.activations.batch_norm import batch_norm
from normkit.catalogue.citation import card_of
from normkit.core.card import Card
from normkit.core.errors import SurgeryError
from normkit.core.moments import accumulation_dtype
from normkit.core.place import Axes
from normkit.core.support import show
from normkit.engine.call import Activation, Save
from normkit.engine.layer import Cast, Layer
from normkit.engine.reference import activate
from normkit.surgery.changes import label
from normkit.surgery.probe import Found, probe
from normkit.weights.attachment import attach


class FrozenBatchNorm(nn.Module):
    """Normalize each channel by fixed statistics, in training and evaluation alike; nothing in it is trained.

    y = weight * (x - running_mean) / sqrt(running_var + eps) + bias. All four are buffers, with the keys of the detectors'
    FrozenBatchNorm2d; the count of a BatchNorm's checkpoint is dropped on loading.

    ``eps``, ``layout`` and ``activation`` are those of BatchNorm.

    Shape: (N, C, *), or (N, *, C) by ``layout``, to the same.

    >>> FrozenBatchNorm(1, eps=0.0)(torch.tensor([[2.0]]))
    tensor([[2.]])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        layout: str = "n c *",
        activation: Activation | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.layout, self.activation = num_features, eps, layout, activation
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize."""
        mean, var, weight, bias = (self.get_buffer(k) for k in ("running_mean", "running_var", "weight", "bias"))
        y = batch_norm(input, mean, var, weight, bias, eps=self.eps, layout=self.layout)
        return activate(y, self.activation)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}" + ("" if self.layout == "n c *" else f", layout={self.layout!r}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


_RANKED = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d),
}


@dataclass(frozen=True)
class Norm:
    """An activation norm as data."""

    kind: str  # the method's name in the catalogue, or ``"frozen_batch_norm"``
    axes: Axes  # of its input
    # Of the axes that hold channels or features; one number unless ``axes`` is ``"trailing"``, none if not known.
    shape: tuple[int, ...]
    eps: float | None  # None stands for the machine epsilon
    weight: nn.Parameter | None  # the gain, one value per channel, or None
    bias: nn.Parameter | None  # likewise
    has_bias: bool = True  # whether its class has a bias unless told otherwise
    # As its method's word has it: the groups of a group norm, the axes of a layer norm on channels first, ``"d"`` for
    # the last of several trailing ones, or "".
    option: str = ""
    momentum: float | None = 0.1  # of running statistics
    tracks: bool = False  # whether it keeps running statistics
    # ``track_running_stats`` of a norm over the batch; if False, those that are there stay; None without such a flag.
    track: bool | None = None
    # Those that run over the batch, by name: mean, variance, count.
    running: dict[str, Tensor | None] = field(default_factory=dict)
    note: str = ""  # what was found out about it that its class does not say
    affine: bool = True  # whether it has parameters
    alone: bool = False  # whether it normalizes each position separately
    rank: int | None = None  # how many axes its input has, or None if not known
    spatial: int | None = None  # axes of positions where its class takes one number of them alone, else None
    offset: float = 0.0  # the gain is this plus the weight
    cast: Cast | None = "after weight"  # when a half type is rounded; None where no layer here rounds like it
    # What follows, by name where layers here know it, else as a module; None where nothing does.
    activation: str | nn.Module | None = None
    dropout: float = 0.0  # behind that
    save: Save = "input"  # what a layer here keeps for the backward pass

    def guard(self, dtype: torch.dtype) -> float:
        """The eps as a number."""
        return torch.finfo(accumulation_dtype(dtype)).eps if self.eps is None else self.eps


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an activation norm: of torch, of normkit, or by the looks of it.

    By its looks: it has no children, or such without parameters as an activation, "norm" in its class's name, and tensors of
    one axis alone, as a norm's weight is; or no tensor at all, and it computes layer or RMS normalization.
    """
    card = card_of(module)
    if card is None and isinstance(module, FrozenBatchNorm):
        return True
    if card is not None:
        return card.kind == "activation" and bool(card.word) and not card.accompanies
    if any(True for child in module.children() for _ in (*child.parameters(), *child.buffers())):
        return False
    if "norm" not in type(module).__name__.lower() or isinstance(module, parametrize.ParametrizationList):
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not own:
        return isinstance(probe(module), Found)
    return max((tensor.dim() for tensor in own if not is_lazy(tensor)), default=0) == 1


def norms_in(model: nn.Module, every_name: bool = False) -> dict[str, nn.Module]:
    """The activation norms of a model by name; one that stands in several places under its first alone, or under every name."""
    found = model.named_modules(remove_duplicate=not every_name)
    return {name: module for name, module in found if "parametrizations" not in name.split(".") and is_norm(module)}


def read_norm(name: str, module: nn.Module, seen: Sequence[int] | None = None) -> Norm:
    """Read an activation norm."""
    who = f"{label(name)} ({type(module).__name__})"
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise SurgeryError(f"{who}: its parameters have no size yet; run the model once on an example first")
    if parametrize.is_parametrized(module) and not _counts_from_one(module):
        raise SurgeryError(f"{who}: its weight is parametrized; bake the parametrization in with fold(model) first")
    if "forward" in vars(module):
        raise SurgeryError(
            f"{who}: its forward was replaced on the object, and a new layer would lose it; undo that first"
        )
    hooks = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    if any(getattr(module, hook, None) for hook in hooks) and not _counts_from_one(module):
        raise SurgeryError(f"{who}: it has hooks on its state_dict, made for its own class; remove them first")
    card = card_of(module)
    makers = ("torch.", "normkit.") if parametrize.is_parametrized(module) or not [*module.children()] else "normkit."
    if card is not None and type(module).forward.__module__.startswith(makers):
        norm = _known(card, module)
    elif isinstance(module, FrozenBatchNorm):
        norm = _frozen(module)
    else:
        norm = _by_behaviour(module, who, card)
    if isinstance(module, Layer):
        norm = replace(norm, dropout=module.dropout or 0.0, save=module.save)
    if seen is None:
        return norm
    shape = norm.shape or (seen[1 if norm.axes == "n c *" else -1],)
    return replace(norm, shape=shape, rank=len(seen))


def has_flag(card: Card) -> bool:
    """Whether a method's layer is a norm over the batch that obeys ``track_running_stats``."""
    return "n" in card.reach and "track_running_stats" in inspect.signature(card.module).parameters


def reach(card: Card, module: nn.Module) -> frozenset[str]:
    """The axes that the statistics of a method's layer reach over."""
    return frozenset(module.rule.support.reduced) if isinstance(module, Layer) and card.over is None else card.reach


def _known(card: Card, module: nn.Module) -> Norm:
    own, notes = dict(module.named_parameters()), []
    if _counts_from_one(module):
        own["weight"] = own.pop("parametrizations.weight.original")
    weight, bias = (own.pop(key, None) if key in card.takes else None for key in ("weight", "bias"))
    shape = _shape(module)
    first = getattr(module, "layout", card.layout) == "n c *" or getattr(module, "over", None) is not None
    axes: Axes = "trailing" if len(shape) > 1 else "n c *" if first else "n * c"
    offset = 1.0 if _counts_from_one(module) else getattr(module, "offset", 0.0)
    if getattr(module, "guard", "inside") != "inside":
        notes.append("eps now inside the root")
    if weight is not None and weight.dim() == 0:
        weight = _expanded(weight, shape)
        bias = None if bias is None else _expanded(bias, shape)
        notes.append("scalar weight spread over channels")
    if own:
        notes.append(f"its {', '.join(dict.fromkeys(key.partition('.')[0] for key in own))} dropped")
    usual = inspect.signature(card.module).parameters.get("bias")
    return Norm(
        card.name,
        axes,
        shape,
        getattr(module, "eps", 1e-5),
        weight,
        bias,
        has_bias=bias is not None or ("bias" in card.takes and (usual is None or usual.default is not False)),
        option="" if card.option is None else card.option.of(module),
        momentum=getattr(module, "momentum", 0.1),
        tracks=getattr(module, "running_mean", None) is not None,
        track=getattr(module, "track_running_stats", None) if has_flag(card) else None,
        running=dict(module._buffers) if "n" in card.reach else {},
        note="; ".join(notes),
        affine=next(module.parameters(), None) is not None,
        alone="*" not in reach(card, module) and axes != "trailing",
        spatial=getattr(
            module, "spatial", next((n for n, kinds in _RANKED.items() if isinstance(module, kinds)), None)
        ),
        offset=offset if weight is not None else 0.0,
        cast=getattr(module, "cast", "after weight"),
        activation=getattr(module, "activation", None) if isinstance(module, Layer) else None,
    )


def _by_behaviour(module: nn.Module, who: str, card: Card | None) -> Norm:
    found = probe(module)
    if isinstance(found, str):
        raise SurgeryError(
            f"{who}: what it computes is not known: {found}; convert by hand, or choose others with where="
        )
    if found.kind == "torch" and card is not None:
        return replace(_known(card, module), activation=found.activation)
    tensors = {**module._buffers, **module._parameters}
    weight, bias = (_parameter(tensors.get(key)) for key in (found.weight, found.bias))
    frozen, several = found.kind == "batch_norm", len(found.shape) > 1
    running = {key: tensors.get(key) for key in ("running_mean", "running_var")} if frozen else {}
    kind, alone = "frozen_batch_norm" if frozen else found.kind, found.over != "c *" and not frozen
    axes: Axes = "trailing" if several else "n c *" if found.over or frozen else "n * c"
    seen = {"offset": float(found.offset), "cast": found.cast, "activation": found.activation}
    kept = {"option": "d" if several else found.over, "tracks": frozen, "running": running, "alone": alone}
    own = {"affine": weight is not None, "has_bias": bias is not None}
    return Norm(kind, axes, found.shape, found.eps, weight, bias, **kept, **own, **seen)


def _frozen(module: FrozenBatchNorm) -> Norm:
    own = module._buffers
    axes: Axes = "n c *" if module.layout == "n c *" else "n * c"
    running = {key: own[key] for key in ("running_mean", "running_var")}
    weight, bias = _parameter(own["weight"]), _parameter(own["bias"])
    kept = {"tracks": True, "running": running, "activation": module.activation}
    return Norm("frozen_batch_norm", axes, (module.num_features,), module.eps, weight, bias, **kept)


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter, or one made of a buffer."""
    return tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone())


def _counts_from_one(module: nn.Module) -> bool:
    """Whether its gain is 1 + a parameter by the parametrization that conversions put there."""
    if not parametrize.is_parametrized(module):
        return False
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return list(lists) == ["weight"] and [type(part) for part in lists["weight"].children()] == [FromOne]  # pyright: ignore


def _expanded(scalar: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(scalar.detach().expand(shape).clone(), requires_grad=scalar.requires_grad)


def describe(module: nn.Module) -> str:
    """A norm on one line: its class and its sizes, such as ``GroupNorm(2, 8)``."""
    own, shape, card = getattr(module, "weight", None), _shape(module), card_of(module)
    if not shape and isinstance(own, Tensor) and own.dim() == 1:
        shape = tuple(own.shape)
    sizes = [str(module.num_groups)] if isinstance(module, nn.GroupNorm) else []
    sizes += [str(shape[0]) if len(shape) == 1 else show(shape)] if shape else []
    told = {key: vars(module).get(key) for key in ("over", "per", "layout")} if isinstance(module, Layer) else {}
    option = "" if card is None or card.option is None else card.option.of(module)
    if card is not None and card.option is not None and option and option not in (*sizes, *told.values()):
        name = card.option.name.lower()
        sizes.append(option if option == name else f"{name}={option}")
    sizes += [f"{key}={value!r}" for key, value in told.items() if value not in (None, "n c *")]
    return f"{type(module).__name__}({', '.join(sizes)})"


def _shape(module: nn.Module) -> tuple[int, ...]:
    """The channels or features that a norm says it has; empty if it does not say."""
    sizes = (getattr(module, key, None) for key in ("normalized_shape", "num_features", "num_channels", "features"))
    size = next((size for size in sizes if size is not None), ())
    return (size,) if isinstance(size, int) else tuple(size)


class FromOne(nn.Module):
    """The parametrization gain = 1 + d, whose decay pulls the gain towards 1.

    >>> FromOne()(torch.tensor([0.5]))
    tensor([1.5000])
    """

    def forward(self, difference: Tensor) -> Tensor:
        """The gain."""
        return 1 + difference

    def right_inverse(self, gain: Tensor) -> Tensor:
        """What is kept of a gain: its difference from 1."""
        return gain - 1


def count_from_one(norm: nn.Module, weight: nn.Parameter) -> None:
    """Make a norm's gain 1 + a parameter, the very object; checkpoints that know it as ``weight`` load."""
    value = weight.data
    norm.register_parameter("weight", weight)
    attach(norm, "weight", FromOne())
    weight.data = value  # attaching took 1 off it
    norm.register_load_state_dict_pre_hook(_from_weight)


def loads_difference(norm: nn.Module) -> bool:
    """Whether plain checkpoints hold the difference as ``weight``, as ``count_from_one`` made the norm."""
    hooks = norm._load_state_dict_pre_hooks.values()
    return any(getattr(hook, "hook", hook) is _from_weight for hook in hooks)


def _from_weight(norm: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    if parametrize.is_parametrized(norm) and f"{prefix}weight" in state:
        state[f"{prefix}parametrizations.weight.original"] = state.pop(f"{prefix}weight")
