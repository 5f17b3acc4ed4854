"""Sliding windows: sums and means over the neighbours of each element along an axis, cut off at the borders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def sliding_sum(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Sum over a window along one axis: out[i] = x[i - before] + ... + x[i + after], without what lies outside the axis.

    A window of p elements takes some log2(p) additions of whole tensors, by sums of 1, 2, 4, ... neighbours. It is as accurate
    as pairwise summation, where differences of a running sum would lose a small window behind large elements.

    Args:
        x: any floating tensor; half types should be widened first.
        dim: the axis.
        before: elements before each one, from 0.
        after: elements after each one, from 0.

    Returns:
        Of the shape of x; differentiable any number of times.

    >>> sliding_sum(torch.tensor([1.0, 10.0, 100.0, 1000.0]), 0, before=1, after=1)
    tensor([  11.,  111., 1110., 1100.])
    """
    dim = dim % x.dim()
    size = x.shape[dim]
    before, after = min(before, max(size - 1, 0)), min(after, max(size - 1, 0))
    window = before + 1 + after
    if window == 1:
        return x
    # Element i of ``power`` is the sum of ``width`` neighbours from i on; the bits of the window say which of them tile it.
    power = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [before, after])
    parts, covered, width = [], 0, 1
    while width <= window:
        if window & width:
            parts.append(power.narrow(dim, covered, size))
            covered += width
        if 2 * width <= window:
            length = power.shape[dim] - width
            power = power.narrow(dim, 0, length) + power.narrow(dim, width, length)
        width *= 2
    return reduce(torch.add, parts)


def sliding_mean(x: Tensor, windows: Sequence[tuple[int, int | None]]) -> Tensor:
    """Mean over a window centred at each element, of the elements that lie inside the tensor.

    Args:
        x: any floating tensor; half types should be widened first.
        windows: pairs of an axis and the window's size along it; an even size reaches one further back than forward. None is
            the whole axis, which the result then has with size 1.

    Returns:
        Broadcasts over x; differentiable any number of times.

    >>> sliding_mean(torch.tensor([1.0, 2.0, 6.0]), [(0, 3)])
    tensor([1.5000, 3.0000, 4.0000])
    """
    whole = [dim for dim, size in windows if size is None]
    if whole:
        x = x.mean(whole, keepdim=True)
    for dim, size in windows:
        if size is None or size == 1:
            continue
        before, after = size // 2, size - 1 - size // 2
        at = torch.arange(x.shape[dim], device=x.device)
        inside = (at + after).clamp_max(x.shape[dim] - 1) - (at - before).clamp_min(0) + 1
        shape = [1] * x.dim()
        shape[dim] = -1
        x = sliding_sum(x, dim, before, after) / inside.view(shape)
    return x
