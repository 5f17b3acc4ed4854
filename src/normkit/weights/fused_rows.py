"""g v / max(norm(v), eps) by torch's fused CPU kernel, which walks the weight once forward and once backward.

torch's own ``weight_norm`` runs on the same kernel, but gives NaN for a zero row, and second derivatives that take the norms
for constants. Here a row below the floor goes another way, and so does a backward pass that is to be differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.engine.eager import traced
from normkit.weights.inverse_norm import inverse_norm


def fused_rows(v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor | None:
    """Slices of v along an axis brought to the lengths g, or None where the kernel does not apply.

    Args:
        v: of any shape.
        g: lengths, of v's shape with 1 on all axes but ``dim``.
        dim: the axis that keeps its lengths, not negative.
        eps: floor of the norm.

    Returns:
        Of v's shape and dtype, differentiable any number of times; None for other devices than a CPU, half types, memory
        formats that the kernel would give up, and under a compiler or ``torch.func``.

    >>> fused_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[10.0], [10.0]]), 0, 1e-12)
    tensor([[6., 8.],
            [0., 0.]])
    """
    if not fuses(v, dim) or g.dtype != v.dtype:
        return None
    return _FusedRows.apply(v, g, dim, eps)  # pyright: ignore[reportReturnType]


def fuses(v: Tensor, dim: int = 0) -> bool:
    """Whether the kernel applies to this tensor and axis."""
    if traced() or v.device.type != "cpu" or v.dtype not in (torch.float32, torch.float64):
        return False
    return v.dim() > 1 and dim in (0, v.dim() - 1) and v.is_contiguous() and v.numel() > 0


class _FusedRows(torch.autograd.Function):
    # A forward with ctx, not setup_context: for a small weight the latter costs more than the kernel.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        v, g, ctx.dim, ctx.eps = inputs
        weight, norms = torch.ops.aten._weight_norm_interface(v, g.contiguous(), ctx.dim)
        ctx.floored = not norms.amin().item() > ctx.eps
        ctx.save_for_backward(v, g, norms)
        return v * (g / norms.clamp_min(ctx.eps)) if ctx.floored else weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        v, g, norms = ctx.saved_tensors
        (dw,) = gradients
        if not ctx.floored and not torch.is_grad_enabled():
            dv, dg = torch.ops.aten._weight_norm_interface_backward(dw.contiguous(), v, g.contiguous(), norms, ctx.dim)
            return dv, dg, None, None
        dims = tuple(d for d in range(v.dim()) if d != ctx.dim)
        inverse = inverse_norm(v, dims, ctx.eps)
        unit = v * inverse
        dg = (dw * unit).sum(dims, keepdim=True)
        return g * inverse * (dw - unit * (dg * (norms > ctx.eps))), dg, None, None
