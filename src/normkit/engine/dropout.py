"""Dropout that stores no mask: the backward pass draws again what the forward pass drew."""

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core.errors import OptionError
from normkit.engine.abi import TYPES, Form, checked, entry, plain
from normkit.engine.library import library
from normkit.engine.plan import is_dense


def check_dropout(who: str, value: Any, heeded: bool) -> None:
    """Refuse what is no probability, and one of a layer that would not heed it."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise OptionError(f"{who}: dropout={value!r}; wanted a probability, a number from 0 to 1")
    if not heeded:
        raise OptionError(
            f"{who}: dropout={value!r} would be ignored, as this layer does not drop; put torch.nn.Dropout behind it"
        )


def drop(x: Tensor, p: float) -> Tensor:
    """Set elements to zero with probability p and divide the others by 1 - p; ``torch.nn.functional.dropout`` without kernels.

    The seed comes from torch's generator of the CPU, one number per call. So ``torch.manual_seed`` decides it, and checkpointing
    that preserves the state draws the same again.
    """
    # plain() first: a compiler stops at what library() reads.
    if p >= 1 or not plain(x) or library() is None or not is_dense(x.shape, x.stride()):
        return F.dropout(x, p)
    return _Drop.apply(x, p, int(torch.empty((), dtype=torch.int64, device="cpu").random_()))


def _drop(x: Tensor, p: float, seed: int) -> Tensor:
    y = torch.empty_like(x)
    checked(entry("nk_dropout")(TYPES[x.dtype], x.numel(), seed, p, x.data_ptr(), y.data_ptr()))
    return y


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.p, ctx.seed, ctx.form = p, seed, Form.of(x)
        return _drop(x, p, seed)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor, None, None]:
        (dy,), form = arrived, ctx.form
        if not torch.is_grad_enabled() and plain(dy):
            return _drop(form.restore(dy), ctx.p, ctx.seed), None, None
        ones = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device="cpu").fill_(1.0)
        return dy * _drop(ones, ctx.p, ctx.seed), None, None
