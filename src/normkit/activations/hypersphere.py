"""The normalized transformer's parts: states on the unit sphere, learned scales, and weights renormalized after each step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ShapeError
from normkit.core.module import Module
from normkit.core.support import check_shape, show
from normkit.engine.dispatch import run
from normkit.engine.layer import tokens_rule


class LearnedScale(Module):
    """Multiply each feature by a learned scale that is stored in other units, which changes its effective learning rate.

    y = s * x with s = weight * start / unit. The weight starts at ``unit``, so s at ``start``; a step of the optimizer moves s by
    start / unit times as much as the weight. The normalized transformer uses it for queries and keys (start 1, unit
    1 / sqrt(D)), for the two inputs of its gated MLP (start 1, unit 1; that of the gate times sqrt(D)), and for logits.

    Args:
        features: number of scales; 1 for a common one.
        start: initial s. Default: 1.
        unit: initial weight. Default: 1.

    Shape: (*, features); the output has the same shape, in the input's dtype.

    Raises:
        OptionError: a unit of 0.

    Reference: Loshchilov, Hsieh, Sun, Ginsburg, "nGPT" (2024), https://arxiv.org/abs/2410.01131.

    >>> scale = LearnedScale(2, start=3.0, unit=0.5)
    >>> scale.weight.tolist(), scale(torch.ones(1, 2)).detach()
    ([0.5, 0.5], tensor([[3., 3.]]))
    """

    shown = "{0.features}, start={0.start}, unit={0.unit:.4g}"

    def __init__(
        self, features: int, start: float = 1.0, unit: float = 1.0, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if unit == 0:
            raise OptionError("LearnedScale: unit=0; wanted another number, as the weight starts there")
        self.features, self.start, self.unit = features, start, unit
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.unit)

    @property
    def scale(self) -> Tensor:
        """The scale s."""
        check_shape("LearnedScale", "weight", self.weight, self.features)
        return self.weight * (self.start / self.unit)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the scale."""
        return (input * self.scale).to(input.dtype)


class HypersphereResidual(Module):
    """Move a state on the unit sphere toward the output of a branch, by a learned step per feature.

    h' = N(h + a * (N(branch) - h)) with N(x) = x / |x|: in place of x + f(norm(x)). The step a starts at ``rate``, and is
    a LearnedScale of unit 1 / sqrt(D).

    Args:
        features: features D.
        rate: initial step a. Default: 0.05, as published.
        eps: floor of the norms. Default: 1e-12.

    Shape: h (*, D), of length 1, and branch of the same shape; the output has this shape and length 1.

    Raises:
        ShapeError: h does not end in ``features``, or the branch has another shape.

    Reference: Loshchilov, Hsieh, Sun, Ginsburg, "nGPT" (2024), https://arxiv.org/abs/2410.01131.

    >>> HypersphereResidual(2, rate=0.5)(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0]])).detach()
    tensor([[0.7071, 0.7071]])
    """

    shown = "{0.features}, eps={0.eps}"

    def __init__(
        self, features: int, rate: float = 0.05, eps: float = 1e-12, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.rate = LearnedScale(features, rate, features**-0.5, device=device, dtype=dtype)

    def forward(self, input: Tensor, branch: Tensor) -> Tensor:
        """Move the state, of length 1, toward the output of attention or the MLP, of any length."""
        if input.dim() < 1 or input.shape[-1] != self.features or input.shape != branch.shape:
            raise ShapeError(
                f"HypersphereResidual: got {show(input.shape)} and {show(branch.shape)}, wanted two alike that end in "
                f"features={self.features}"
            )
        return hypersphere_residual(input, branch, self.rate.scale, self.eps)


def hypersphere(input: Tensor, eps: float = 1e-12) -> Tensor:
    """Project each token onto the unit sphere: x / max(|x|, eps) over the last axis, with the norm in at least float32.

    Reference: Loshchilov et al., "nGPT" (2024), https://arxiv.org/abs/2410.01131.

    >>> hypersphere(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    return run(tokens_rule("norm", eps, "floor"), input)


def hypersphere_residual(input: Tensor, branch: Tensor, rate: Tensor | float, eps: float = 1e-12) -> Tensor:
    """Move a state toward a branch, as a function of a rate: one number, or one per feature; see HypersphereResidual.

    >>> hypersphere_residual(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0]]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    target = hypersphere(branch, eps)
    moved = input + rate * (target - input)
    return hypersphere(moved, eps).to(input.dtype)


@torch.no_grad()
def renormalize_(reads: Iterable[nn.Module] = (), writes: Iterable[nn.Module] = (), eps: float = 1e-12) -> None:
    """Project the weights' vectors of the embedding's dimension back onto the unit sphere, in place, after an optimizer step.

    Args:
        reads: layers whose input is the state, with weight (out, D): linear maps to queries, keys, values and the MLP, the
            embedding (words, D), the output layer. Each row gets length 1.
        writes: layers whose output is added to the state, with weight (D, in): the last layer of attention and of the MLP.
            Each column gets length 1.
        eps: floor of the norms. Default: 1e-12.

    Raises:
        ShapeError: a layer without a weight of two axes.

    Reference: Loshchilov et al., "nGPT" (2024), https://arxiv.org/abs/2410.01131.

    >>> layer = nn.Embedding.from_pretrained(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    >>> renormalize_(reads=[layer])
    >>> layer.weight.data
    tensor([[0.6000, 0.8000],
            [0.0000, 1.0000]])
    """
    for layers, dim in ((reads, 1), (writes, 0)):
        for layer in layers:
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                shape = show(weight.shape) if isinstance(weight, Tensor) else "none"
                raise ShapeError(f"renormalize_: {type(layer).__name__} has a weight of shape {shape}; wanted two axes")
            weight.copy_(hypersphere(weight, eps) if dim else hypersphere(weight.T, eps).T)


CARD = Card(
    title="Residual step on the unit sphere (nGPT)",
    wordless="it replaces a residual sum of two inputs",
    normalized_over="each token, over its features, to length 1: the branch, and the state after its step",
    formula="h' = N(h + a * (N(branch) - h)), N(x) = x / |x|",
    paper=paper("loshchilov2024ngpt"),
    use_cases="language models trained from the start with all vectors on one sphere",
    strengths="needs neither weight decay nor warm-up; its authors report fewer steps to the same loss",
    weaknesses="weights must be renormalized after each step; more scales to learn; each step costs more",
    module=HypersphereResidual,
    functional=hypersphere_residual,
    layout="* d",
    extra=lambda x: (x.flip(-1).double().sin().to(x.dtype),),
)
