"""Global response normalization on the native kernels: each channel weighted by its relative energy."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.core.moments import accumulation_dtype
from normkit.engine.abi import TYPES, Form, checked, entry, gradients, lanes, like, plain, pointer
from normkit.engine.library import library

Definition = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


class _Plan(ctypes.Structure):
    """NkResponse of native/responses.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "channels", "positions")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("type", "last", "shared", "parts")),
    )


def weigh(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float, shared: bool, definition: Definition
) -> Tensor | None:
    """Weight channels by their energy relative to the mean energy: x * (1 + weight * share) + bias.

    ``shared`` measures energies over all samples together. None for what the kernels do not take.
    """
    if not plain(x, weight, bias) or library() is None:
        return None
    found = lanes(x, axis)
    if found is None or any(p is not None and p.numel() != found.channels for p in (weight, bias)):
        return None
    parts = (weight is not None) + 2 * (bias is not None)
    plan = _Plan(found.outer, found.channels, found.inner, eps, TYPES[x.dtype], found.last, shared, parts)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Weigh.apply(x, weight, bias, plan, definition)
    return _forward(x, weight, bias, plan)[0]


def _wide(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.detach().to(accumulation_dtype(x.dtype)).contiguous()


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor]:
    weight, bias = _wide(weight, x), _wide(bias, x)
    y = torch.empty_like(x)
    energy = x.new_empty(1 if plan.shared else plan.samples, plan.channels, dtype=torch.float64)
    pointers = x.data_ptr(), pointer(weight), pointer(bias), y.data_ptr(), energy.data_ptr()
    checked(entry("nk_response_forward")(ctypes.addressof(plan), *pointers))
    return y, energy


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, plan: _Plan, definition: Definition
    ) -> Tensor:
        y, energy = _forward(x, weight, bias, plan)
        ctx.plan, ctx.definition, ctx.form = plan, definition, Form.of(x)
        ctx.save_for_backward(x, weight, bias, energy)
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, bias, energy), (dy,) = ctx.saved_tensors, dys
        needed = ctx.needs_input_grad[:3]
        # Gradients are recorded in a backward pass only for derivatives of derivatives, of which the kernels know nothing.
        if torch.is_grad_enabled() or not plain(dy):
            return *gradients(ctx.definition, (x, weight, bias), needed, dy), None, None
        x = ctx.form.restore(x)
        dx = torch.empty_like(x) if needed[0] else None
        wide = _wide(weight, x)
        found = [
            x.new_empty(p.shape, dtype=accumulation_dtype(x.dtype)) if wanted else None
            for p, wanted in ((weight, needed[1]), (bias, needed[2]))
        ]
        dy = like(dy, x)
        pointers = dy.data_ptr(), x.data_ptr(), pointer(wide), energy.data_ptr(), pointer(dx), *map(pointer, found)
        checked(entry("nk_response_backward")(ctypes.addressof(ctx.plan), *pointers))
        dweight, dbias = (None if g is None else g.to(p.dtype) for g, p in zip(found, (weight, bias), strict=True))
        return dx, dweight, dbias, None, None
