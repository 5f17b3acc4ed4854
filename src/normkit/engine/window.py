"""Sliding windows: sums, means and moments over the neighbours of each element along an axis, cut off at the borders."""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core.moments import Moments
from normkit.engine import native_window
from normkit.engine.pooling import pool


def sliding_sum(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Sum over a window along one axis: out[i] = x[i - before] + ... + x[i + after]; elements outside the axis count as zero.

    A window of p elements takes about log2(p) additions of whole tensors, by sums of 1, 2, 4, ... neighbours. It is as accurate
    as pairwise summation, whereas differences of a running sum would lose a small window that follows large elements.

    >>> sliding_sum(torch.tensor([1.0, 10.0, 100.0, 1000.0]), 0, before=1, after=1)
    tensor([  11.,  111., 1110., 1100.])
    """
    dim = dim % x.dim()
    size = x.shape[dim]
    # A wider window reaches nothing more, and would only cost additions of padding.
    before, after = min(before, max(size - 1, 0)), min(after, max(size - 1, 0))
    window = before + 1 + after
    if window == 1:
        return x
    if (found := native_window.total(x, dim, before, after, sliding_sum)) is not None:
        return found
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
    """Mean over windows centred at each element, of the elements inside the tensor; ``windows`` are pairs of an axis and a size.

    An even size reaches one further back than forward. None is the whole axis, which has size 1 in the result.

    >>> sliding_mean(torch.tensor([1.0, 2.0, 6.0]), [(0, 3)])
    tensor([1.5000, 3.0000, 4.0000])
    """
    whole = [dim for dim, size in windows if _covers(size, x.shape[dim])]
    if whole:
        x = x.mean(whole, keepdim=True)
    for dim, size in windows:
        if dim in whole or size is None or size == 1:
            continue
        before, after = size // 2, size - 1 - size // 2
        # The neighbours inside, counted from the borders in a few operators; a sliding sum of ones would take a dozen.
        at = torch.arange(x.shape[dim], device=x.device)
        inside = (at + after).clamp_max(x.shape[dim] - 1) - (at - before).clamp_min(0) + 1
        shape = [1] * x.dim()
        shape[dim] = -1
        x = sliding_sum(x, dim, before, after) / inside.view(shape)
    return x


def sliding_moments(found: Moments, windows: Sequence[tuple[int, int | None]]) -> Moments:
    """Mean and variance over a window centred at each element, from the moments of sets of one size.

    Windows are merged from windows of 1, 2, 4, ... neighbours by Chan's formula: a variance that is small next to the mean keeps
    its digits, which the difference of two box filters would lose.
    """
    whole = [dim for dim, size in windows if _covers(size, found.mean.shape[dim])]
    if whole:
        found = pool(found, whole)
    for dim, size in windows:
        if dim not in whole and size is not None and size > 1:
            found = _slide(found, dim, size)
    return found


def _covers(window: int | None, size: int) -> bool:
    """Whether the window of each element is the whole axis."""
    return window is None or (window - 1) // 2 >= size - 1


def _slide(found: Moments, dim: int, window: int) -> Moments:
    """Moments over a window along one axis."""
    mean, var, number = found
    size = mean.shape[dim]
    last = max(size - 1, 0)
    before, after = min(window // 2, last), min(window - 1 - window // 2, last)
    window = before + 1 + after
    padding = [0, 0] * (mean.dim() - 1 - dim) + [before, after]
    shape = [1] * mean.dim()
    shape[dim] = size
    # Positions are counted along one axis only, in units of ``number``: every position holds equally many elements.
    there = F.pad(torch.ones(shape, dtype=mean.dtype, device=mean.device), padding)
    power = Moments(F.pad(mean, padding), F.pad(var, padding), there)
    parts: list[Moments] = []
    covered, width = 0, 1
    while width <= window:
        if window & width:
            parts.append(_narrow(power, dim, covered, size))
            covered += width
        if 2 * width <= window:
            length = power.mean.shape[dim] - width
            power = _merge(_narrow(power, dim, 0, length), _narrow(power, dim, width, length))
        width *= 2
    merged = reduce(_merge, parts)
    return merged._replace(n=merged.n * number)


def _narrow(found: Moments, dim: int, start: int, length: int) -> Moments:
    mean, var, number = found
    assert isinstance(number, Tensor)
    return Moments(*(part.narrow(dim, start, length) for part in (mean, var, number)))


def _merge(a: Moments, b: Moments) -> Moments:
    """Merge by Chan's formula, where both sides may lie outside the tensor and be empty."""
    total = a.n + b.n
    assert isinstance(total, Tensor)
    # Two windows of padding hold nothing, and 0 / 0 would spread NaN from there through sums that multiply it by zero.
    share = b.n / total.clamp_min(1)
    rest = a.n / total.clamp_min(1)
    delta = b.mean - a.mean
    return Moments(
        a.mean * rest + b.mean * share, a.var * rest + b.var * share + delta.square() * (share * rest), total
    )
