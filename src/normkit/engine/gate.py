"""The gate of a gated norm in one pass, and its gradients in another."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core.moments import accumulation_dtype
from normkit.engine.abi import TYPES, Form, checked, entry, gradients, plain
from normkit.engine.library import library
from normkit.engine.plan import is_dense

_WIDE_X, _WIDE_Y = 1, 2  # NkWide of native/plan.h


def gated(x: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """The product x * silu(gate), computed in at least float32 and rounded once, to ``dtype``."""
    kinds, wide = (x.dtype != gate.dtype, dtype != gate.dtype), accumulation_dtype(gate.dtype)
    # plain() first: a compiler stops at what library() reads.
    known = plain(x, gate) and all(kind in (gate.dtype, wide) for kind in (x.dtype, dtype)) and not all(kinds)
    if not known or x.numel() == 0 or library() is None:
        return _define(x, gate, dtype)
    if x.stride() != gate.stride() or not is_dense(x.shape, x.stride()):
        x, gate = x.contiguous(), gate.contiguous()
    return _Gated.apply(x, gate, dtype)


def _define(x: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(accumulation_dtype(x.dtype), accumulation_dtype(gate.dtype))
    return (x.to(wide) * F.silu(gate.to(wide))).to(dtype)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = torch.empty_like(x, dtype=dtype)
        ctx.wide = _WIDE_X * (x.dtype != gate.dtype) + _WIDE_Y * (dtype != gate.dtype)
        ctx.forms = Form.of(x), Form.of(gate), Form.of(y)
        pointers = x.data_ptr(), gate.data_ptr(), y.data_ptr()
        checked(entry("nk_gate")(TYPES[gate.dtype], ctx.wide, x.numel(), *pointers))
        ctx.save_for_backward(x, gate)
        return y

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,), (x, gate), forms = arrived, ctx.saved_tensors, ctx.forms
        if torch.is_grad_enabled() or not plain(dy):
            dtype = forms[2].dtype
            dx, dgate = gradients(lambda x, gate: _define(x, gate, dtype), (x, gate), ctx.needs_input_grad[:2], dy)
            return dx, dgate, None
        x, gate, dy = (form.restore(t) for form, t in zip(forms, (x, gate, dy), strict=True))
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        pointers = (t.data_ptr() for t in (dy, x, gate, dx, dgate))
        checked(entry("nk_gate_backward")(TYPES[gate.dtype], ctx.wide, x.numel(), *pointers))
        return dx, dgate, None
