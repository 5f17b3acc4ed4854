"""The base of weight parametrizations that run on the kernels where these take the weight, and the reciprocal of a norm."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.core.errors import ShapeError
from normkit.core.rule import Rule
from normkit.core.statistic import length
from normkit.core.support import per_shape, show
from normkit.engine.eager import traced
from normkit.weights import kernels
from normkit.weights.multi_tensor import Share
from normkit.weights.spare import Spare


class Parametrization(nn.Module):
    """Map a raw weight (and, for some methods, one gain per set) to the effective weight.

    A subclass defines ``definition``, in differentiable PyTorch, and ``plan``, for a kernel. Its raw tensors are the weight, or
    the gain and the weight. ``shown`` is a format of the module, for ``extra_repr``.
    """

    shown: ClassVar[str]

    # Whether each set is a row of axis 0, so that channels-last weights need no copy.
    by_rows: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[tuple[object, ...], kernels.Plan | None] = {}
        self._spare = Spare()

    def __getstate__(self) -> dict[str, Any]:
        # Plans are bytes of a C structure, which another version of the kernels may lay out differently.
        return {**vars(self), "_plans": {}}

    def forward(self, *raw: Tensor) -> Tensor:
        """The effective weight, of the raw weight's shape and dtype."""
        *gain, weight = raw
        return self.made(weight, *gain)

    def right_inverse(self, weight: Tensor) -> Any:
        """The raw tensors that assigning a weight stores: by default that weight itself."""
        return weight

    def extra_repr(self) -> str:
        """The arguments."""
        return self.shown.format(self)

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        """Compute the effective weight by PyTorch's operators."""
        raise NotImplementedError

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        """Make the plan of a kernel for such a weight; None for what no kernel does."""
        raise NotImplementedError

    def options(self) -> tuple[object, ...]:
        """The options that the plan depends on, besides the weight's shape and dtype."""
        return ()

    def made(self, weight: Tensor, *gain: Tensor) -> Tensor:
        """Compute the effective weight, on the kernels where they take the raw one."""
        plan = self._plan_here(weight, *gain)
        if plan is None:
            if not torch.compiler.is_compiling():  # a compiler has no tensors with the negative bit
                weight, gain = weight.resolve_neg(), tuple(g.resolve_neg() for g in gain)
            return self.definition(weight, *gain)
        return kernels.normalize(weight, gain[0] if gain else None, plan, self.definition, self._spare)

    def share(self, *raw: Tensor) -> Share | None:
        """The raw tensors' part, with the weight last, of one call for many weights; None where the kernels don't run."""
        *gain, weight = raw
        plan = self._plan_here(weight, *gain)
        return None if plan is None else Share(plan, self.definition, weight, gain[0] if gain else None)

    def _plan_here(self, weight: Tensor, *gain: Tensor) -> kernels.Plan | None:
        if not kernels.takes(weight, *gain, rows=self.by_rows):
            return None
        # Not the strides: takes() accepted them, and the kernels walk rows the same way in both layouts.
        key = (weight.shape, weight.dtype, *self.options())
        if key not in self._plans:
            self._plans[key] = self.plan(weight)
        plan = self._plans[key]
        if plan is not None and gain and gain[0].numel() != plan.sets:
            return None  # the definition raises the error
        return plan


def laid_out(gain: Tensor, rule: Rule, weight: Tensor, who: str) -> Tensor:
    """Bring the gains of a rule on a weight, one per set, to the shape in which they multiply it."""
    assert rule.compensation is not None
    shape = per_shape(rule.compensation.per, rule.support.split(weight.shape))
    if gain.numel() != math.prod(shape):
        raise ShapeError(
            f"{who}: got {gain.numel()} lengths ({show(gain.shape)}) for a weight of {show(weight.shape)}; wanted "
            f"{math.prod(shape)}, of shape {show(shape)}"
        )
    return gain.reshape(shape)


def release(model: nn.Module) -> None:
    """Free the memory that the parametrizations of a model keep from one training step to the next."""
    for part in model.modules():
        if isinstance(part, Parametrization):
            part._spare.empty()


def inverse_norm(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Compute 1 / max(norm, eps) over some axes, kept with size 1.

    Autograd through the definition gives NaN for the second derivative at a zero row; this gives zero.
    """
    if traced():
        return length(x, dims).clamp_min(eps).reciprocal()
    return _InverseNorm.apply(x, dims, eps)  # pyright: ignore[reportReturnType]


class _InverseNorm(torch.autograd.Function):
    # A forward with ctx, not setup_context: for a small weight the latter costs more than the norm.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, dims, ctx.eps = inputs
        inverse = length(x, dims).clamp_min_(ctx.eps).reciprocal_()
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, inverse = ctx.saved_tensors
        # Against the very reciprocal that the floor gives: in floating point (1 / eps) * eps may be less than 1.
        above = inverse < torch.full_like(inverse, ctx.eps).reciprocal()
        return x * torch.where(above, -gradients[0] * inverse**3, 0.0), None, None
