"""The output units and input units of a layer's weight."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.support import Support, show

View = Literal["operator", "unfold"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class WeightLayout:
    """Which axis of a weight indexes output units, and how many groups share its first axis.

    A row of the layer's matrix holds the weights of one output unit, a column those of one input unit. Groups are diagonal
    blocks: a row lies in one group, and so does a column.

    Args:
        output_axis: 0 for ``(out, in/groups, *)``, 1 for ``(in, out/groups, *)``.
        groups: number of matrices concatenated along axis 0.

    >>> WeightLayout(groups=2).columns()
    Support("(g o) i *", over="o *", g=2)
    """

    output_axis: int = 0
    groups: int = 1

    @property
    def rows(self) -> Support:
        """The support of one output unit: everything that feeds it."""
        if self.output_axis == 0:
            return Support("o *", over="*")
        return Support("i o *", over="i *") if self.groups == 1 else Support("(g i) o *", over="i *", g=self.groups)

    def columns(self, view: View = "operator") -> Support:
        """The support of one input unit: everything that it feeds, within its group.

        Args:
            view: for a convolution, ``"operator"`` has one column per input channel, whose norm is that of the columns of the
                circular convolution; ``"unfold"`` has one column per input channel and tap, as in the unfolded matrix.

        Raises:
            OptionError: an unknown view.
        """
        check_options("columns", view=(view, View))
        over = "o *" if view == "operator" else "o"
        if self.output_axis == 1:
            return Support("i o *", over=over)
        return Support("o i *", over=over) if self.groups == 1 else Support("(g o) i *", over=over, g=self.groups)

    def nest(self, shape: torch.Size, view: View = "operator") -> tuple[int, int, int, int] | None:
        """The axes of a contiguous weight in the order of memory, merged to groups x far x kept x inner.

        Rows of axis-0 layouts and columns of axis-1 layouts belong to one (group, far); the others to one (group, kept).
        None where the sets are laid out otherwise.

        >>> WeightLayout(groups=2).nest(torch.Size([4, 3, 5, 5])), WeightLayout(groups=2).nest(torch.Size([4, 3, 5, 5]), "unfold")
        ((2, 2, 3, 25), (2, 2, 75, 1))
        """
        far, kept, inner = shape[0] // self.groups, shape[1], math.prod(shape[2:])
        if view == "unfold" and inner > 1:
            if self.output_axis == 1:
                return None
            kept, inner = kept * inner, 1
        return self.groups, far, kept, inner

    def matrix(self, weight: Tensor) -> Tensor:
        """The 2-D unfolding: one row per output unit, one column per input unit and tap, with groups stacked.

        Args:
            weight: a weight of two axes or more.

        Returns a view if the strides allow it, else a copy.

        Raises:
            ShapeError: the weight has fewer than two axes, or does not split into the groups.

        >>> WeightLayout(output_axis=1).matrix(torch.zeros(2, 3, 5)).shape
        torch.Size([3, 10])
        """
        if weight.dim() < 2:
            raise ShapeError(f"a weight of shape {show(weight.shape)} has no matrix; wanted two axes or more")
        if self.output_axis == 0:
            return weight.flatten(1)
        groups = self.rows.split(weight.shape).shape[0] if self.groups > 1 else 1
        apart = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return apart.transpose(1, 2).flatten(2).flatten(0, 1)

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The weight of a shape whose 2-D unfolding is this matrix.

        >>> layout = WeightLayout(output_axis=1)
        >>> layout.weight(layout.matrix(torch.arange(6).view(2, 3)), torch.Size([2, 3]))
        tensor([[0, 1, 2],
                [3, 4, 5]])
        """
        if self.output_axis == 0:
            return matrix.reshape(shape)
        inputs = shape[0] // self.groups
        return matrix.reshape(self.groups, shape[1], inputs, *shape[2:]).transpose(1, 2).reshape(shape)


def weight_layout(layer: nn.Module, name: str = "weight") -> WeightLayout:
    """Find the output units and input units of a layer's weight.

    It knows Linear, convolutions, transposed convolutions, attention's stacked projections and the ``Conv1D`` of GPT-2 in
    transformers, whose weight is (in, out). An Embedding's output unit is a token, whose row is its vector: so it agrees with an
    output layer that shares its weight. In any other weight axis 0 indexes output units and axis 1 input units.

    Args:
        layer: the layer that holds the weight, parametrized or not.
        name: name of the weight.

    >>> weight_layout(nn.ConvTranspose2d(4, 6, 3, groups=2)).rows
    Support("(g i) o *", over="i *", g=2)
    """
    if name == "weight":
        if isinstance(layer, _TRANSPOSED):
            return WeightLayout(output_axis=1, groups=layer.groups)
        if isinstance(layer, _CONVOLUTIONS):
            return WeightLayout(groups=layer.groups)
        if hasattr(layer, "nf") and any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__):
            return WeightLayout(output_axis=1)
    if isinstance(layer, nn.MultiheadAttention) and name == "in_proj_weight":
        return WeightLayout(groups=3)  # the query's, the key's and the value's matrix
    return WeightLayout()


def layout_of_several(layer: nn.Module, name: str, who: str) -> WeightLayout:
    """The layout of a layer's weight; OptionError where an output unit has one element, which minus its mean is zero."""
    weight, layout = weight_of(layer, name, who), weight_layout(layer, name)
    if weight.dim() < 2 or layout.rows.split(weight.shape).count == 1:
        raise OptionError(
            f"{who}: the {name} of {type(layer).__name__} ({show(weight.shape)}) has one element for each output unit, which "
            "minus its mean is zero; leave this layer out"
        )
    return layout


def hooked_weight(layer: nn.Module, name: str) -> tuple[str, Tensor] | None:
    """Find which utility of torch's hooks a weight, a plain attribute then, before each pass, and of which parameter, or None."""
    if not isinstance(vars(layer).get(name), Tensor):
        return None
    for key, utility, suffix in (("mask", "prune", "orig"), ("u", "spectral_norm", "orig"), ("g", "weight_norm", "v")):
        raw = getattr(layer, f"{name}_{suffix}", None)
        if hasattr(layer, f"{name}_{key}") and isinstance(raw, Tensor):
            return f"torch.nn.utils.{utility}", raw
    return None


def raw_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor, Support | None]]:
    """Yield every parameter once, parametrized or not: its layer's name, the layer, itself, and the support of an output unit.

    The support is None for biases, gains, lengths and all else that a parametrization learns.
    """
    seen: set[int] = set()
    for name, layer in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        held = {key: [parameter] for key, parameter in layer.named_parameters(recurse=False)}
        if parametrize.is_parametrized(layer):
            lists = layer.get_submodule("parametrizations").named_children()
            held |= {key: list(parts.parameters()) for key, parts in lists}
        for key, parameters in held.items():
            size = max((parameter.numel() for parameter in parameters), default=0)
            for parameter in parameters:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    is_weight = parameter.dim() > 1 and parameter.numel() == size
                    yield name, layer, parameter, weight_layout(layer, key).rows if is_weight else None


def weight_of(layer: nn.Module, name: str, who: str) -> Tensor:
    """The layer's current weight; OptionError names the layer's tensors where it is none of them, or has no shape yet."""
    weight = getattr(layer, name, None)
    if not isinstance(weight, Tensor):
        held = [key for key, _ in layer.named_parameters(recurse=False)]
        raise OptionError(
            f"{who}: {type(layer).__name__} has no parameter {name!r}; it has: {', '.join(held) or 'none'}"
        )
    if is_lazy(weight):
        raise OptionError(f"{who}: the {name} of {type(layer).__name__} has no shape yet; run the layer once first")
    if not torch.is_floating_point(weight):
        raise OptionError(f"{who}: the {name} of {type(layer).__name__} is {weight.dtype}; wanted a floating dtype")
    return weight
