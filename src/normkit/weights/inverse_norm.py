"""The reciprocal of a norm with a floor, differentiable to any order even where the floor holds."""

from typing import Any

import torch
from torch import Tensor

from normkit.core.statistic import length
from normkit.engine.eager import traced


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
