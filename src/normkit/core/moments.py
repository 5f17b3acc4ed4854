"""Moments over a support, their merging, and the numerics contract of every statistic.

The contract: statistics are accumulated and kept in at least float32 (float64 stays float64); variance is two-pass, never
E[x^2] - E[x]^2; the output has the input's dtype. It holds for |mean| / std from 0 to 1e4 in every layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.core.errors import OptionError


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are accumulated and kept: float64 for float64, else float32; integers raise OptionError."""
    if not dtype.is_floating_point:
        raise OptionError(f"statistics of a {dtype} tensor: wanted a floating dtype; convert it first, e.g. x.float()")
    return torch.float64 if dtype == torch.float64 else torch.float32


class Moments(NamedTuple):
    """Mean, population variance and number n of elements; n is an int, or a tensor where a mask makes it vary between sets."""

    mean: Tensor
    var: Tensor
    n: int | Tensor

    def unbiased(self) -> Tensor:
        """The variance with the divisor n - 1; NaN for a single element, where it is undefined."""
        count = self.n
        if isinstance(count, Tensor):
            return torch.where(count > 1, self.var * (count / (count - 1)), math.nan)
        return self.var * (count / (count - 1)) if count > 1 else torch.full_like(self.var, math.nan)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets of elements.

        n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d n_b / n,  M2 = M2_a + M2_b + d^2 n_a n_b / n,  var = M2 / n.

        A side with n = 0 leaves the other, of the same shape, unchanged.

        Reference: Chan, Golub, LeVeque (1983), https://doi.org/10.1080/00031305.1983.10483115.

        >>> a = Moments(torch.tensor(1.0), torch.tensor(0.0), 1)
        >>> b = Moments(torch.tensor(4.0), torch.tensor(1.0), 2)
        >>> a.merge(b)
        Moments(mean=tensor(3.), var=tensor(2.6667), n=3)
        """
        if not isinstance(self.n, Tensor) and not isinstance(other.n, Tensor):
            if self.n == 0 or other.n == 0:  # the share would be 0 / 0 where both are empty
                return other if self.n == 0 else self
        total = self.n + other.n
        share = other.n / (total.clamp_min(1) if isinstance(total, Tensor) else total)
        delta = other.mean - self.mean
        var = self.var + share * (other.var - self.var) + share * (1 - share) * delta.square()
        return Moments(self.mean + delta * share, var, total)


def moments(x: Tensor, dims: Sequence[int], mask: Tensor | None = None) -> Moments:
    """Mean and population variance over some axes, reduced axes kept with size 1.

    mean = E[x],  var = E[(x - mean)^2], where E runs over ``dims`` and, with a mask, over the elements where it is True.
    The mean is corrected by the mean of the residuals, so that a mean of 1e4 times the deviation costs no accuracy.

    Args:
        x: any floating tensor; half types are accumulated in float32.
        dims: the axes to reduce.
        mask: boolean, broadcasts over x; elements where it is False are left out.

    Returns moments in the accumulation dtype; differentiable any number of times.

    Raises:
        OptionError: x is not floating.

    >>> moments(torch.tensor([[1.0, 3.0], [2.0, 6.0]]), dims=(1,))
    Moments(mean=tensor([[2.],
            [4.]]), var=tensor([[1.],
            [4.]]), n=2)
    """
    x = x.to(accumulation_dtype(x.dtype))
    dims = tuple(dims)
    if not dims:
        return Moments(x, torch.zeros_like(x), 1)  # torch would take no axes for all of them
    if mask is None:
        count: int | Tensor = math.prod([x.shape[d] for d in dims])
        first = x.mean(dims, keepdim=True)
        rest = x - first
        # The rounding error of the first mean grows with the mean; that of the mean of the residuals only with the deviation.
        shift = rest.mean(dims, keepdim=True)
        return Moments(first + shift, (rest - shift).square().mean(dims, keepdim=True), count)
    mask = mask.expand(x.shape)
    count = mask.sum(dims, keepdim=True).to(x.dtype)
    divisor = count.clamp_min(1)  # a set that the mask empties gets the mean 0: NaN would reach gradients through where
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    first = torch.where(mask, x, zero).sum(dims, keepdim=True) / divisor
    rest = torch.where(mask, x - first, zero)
    shift = rest.sum(dims, keepdim=True) / divisor
    var = torch.where(mask, rest - shift, zero).square().sum(dims, keepdim=True) / divisor
    return Moments(first + shift, var, count)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of x, in which matrix products keep the dtype of their operands."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
