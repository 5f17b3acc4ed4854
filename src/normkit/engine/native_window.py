"""Windows on the native kernels: sums over the neighbours along an axis, and local response normalization by such sums."""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.engine.abi import TYPES, Form, Lanes, checked, entry, gradients, lanes, like, plain
from normkit.engine.library import library
from normkit.engine.plan import is_dense


class Window(NamedTuple):
    """y_c = x_c / (offset + factor * (x^2 summed over the channels c - before to c + after))^power."""

    before: int
    after: int
    offset: float
    factor: float
    power: float


class _Plan(ctypes.Structure):
    """NkWindow of native/responses.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outer", "channels", "inner", "before", "after")),
        *((name, ctypes.c_double) for name in ("offset", "factor", "power")),
        *((name, ctypes.c_int32) for name in ("type", "reserved")),
    )


def total(
    x: Tensor, dim: int, before: int, after: int, definition: Callable[[Tensor, int, int, int], Tensor]
) -> Tensor | None:
    """Sum over a window along one axis of a dense x, differentiable by the definition; None for what the kernels do not take."""
    if x.numel() == 0 or not plain(x) or library() is None or not is_dense(x.shape, x.stride()):
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return _Total.apply(x, dim, before, after, definition)
    return _total(x, dim, before, after)


def _total(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    size, inner = x.shape[dim], x.stride(dim)
    plan = _Plan(x.numel() // (size * inner), size, inner, before, after, 0.0, 0.0, 0.0, TYPES[x.dtype], 0)
    y = torch.empty_like(x)
    checked(entry("nk_window_sum")(ctypes.addressof(plan), x.data_ptr(), y.data_ptr()))
    return y


def divide(x: Tensor, window: Window, definition: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Divide each element of (N, C, *) by the power of the energy in its window; None for what the kernels do not take."""
    if not plain(x) or library() is None:
        return None
    found = lanes(x)
    if found is None:
        return None
    plan = _plan(x, window, found)
    return _Divide.apply(x, plan, definition) if torch.is_grad_enabled() and x.requires_grad else _forward(x, plan)


def _plan(x: Tensor, window: Window, found: Lanes) -> _Plan:
    outer, inner = (found.outer * found.inner, 1) if found.last else (found.outer, found.inner)
    most = found.channels - 1
    return _Plan(
        outer, found.channels, inner, min(window.before, most), min(window.after, most), *window[2:], TYPES[x.dtype], 0
    )


def _forward(x: Tensor, plan: _Plan) -> Tensor:
    y = torch.empty_like(x)
    checked(entry("nk_window_forward")(ctypes.addressof(plan), x.data_ptr(), y.data_ptr()))
    return y


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, dim: int, before: int, after: int, definition: Callable[[Tensor, int, int, int], Tensor]
    ) -> Tensor:
        ctx.window, ctx.definition = (dim, before, after), definition
        return _total(x, dim, before, after)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None, None, None, None]:
        dim, before, after = ctx.window
        return ctx.definition(dys[0], dim, after, before), None, None, None, None


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, plan: _Plan, definition: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.plan, ctx.definition, ctx.form = plan, definition, Form.of(x)
        ctx.save_for_backward(x)
        return _forward(x, plan)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), (dy,) = ctx.saved_tensors, dys
        if torch.is_grad_enabled() or not plain(dy):
            return gradients(ctx.definition, (x,), (True,), dy)[0], None, None
        x = ctx.form.restore(x)
        dx = torch.empty_like(x)
        dy = like(dy, x)
        checked(entry("nk_window_backward")(ctypes.addressof(ctx.plan), dy.data_ptr(), x.data_ptr(), dx.data_ptr()))
        return dx, None, None
