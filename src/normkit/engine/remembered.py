"""Running statistics as the kernels read them and bring them up to date."""

import torch
from torch import Tensor

from normkit.core.memory import Running, RunningMoments, RunningStatistics, recomputed
from normkit.core.support import place
from normkit.engine.abi import TYPES, checked
from normkit.engine.prepared import Prepared


def of_arrays(ready: Prepared, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """A row of 1 / scale and a row of centres, in one call, from statistics that are laid out as the kernel's."""
    values = x.new_empty(2 * ready.nest.statistics, dtype=ready.wide)
    start = values.data_ptr()
    variance = var.data_ptr() if ready.scaled else None
    checked(ready.given(ready.address, ready.arrays, mean.data_ptr(), variance, start, start + ready.statistic_bytes))
    return values


def placed(ready: Prepared, x: Tensor, running: RunningStatistics) -> Tensor:
    """The same rows from statistics that are laid out in another way."""
    values = x.new_empty(2 * ready.nest.statistics, dtype=ready.wide)
    memory, statistic, split = ready.rule.memory, ready.rule.statistic, ready.split
    assert memory is not None
    ready.statistic(values, 1).copy_(place(running.mean, memory.per, split))
    inverse = ready.statistic(values, 0)
    if statistic.scale is None:
        inverse.fill_(1.0)
    else:
        var = place(running.var, memory.per, split).to(ready.wide)
        inverse.copy_(statistic.guarded(var, power=2).reciprocal())
    return values


def updates(memory: Running) -> bool:
    """Whether the library can update this memory; a cumulative average counts its batches, in Python."""
    return type(memory) in (Running, RunningMoments) and memory.momentum is not None


def remember(ready: Prepared, memory: Running, values: Tensor, running: RunningStatistics) -> None:
    """Update running statistics in place by what ``normalize`` measured, in one call; ``ready.arrays`` is their type."""
    if recomputed():
        return
    mean, var = running.mean, running.var
    if running.batches is not None:
        running.batches.add_(1)
    count, start, step = ready.split.count, values.data_ptr(), ready.statistic_bytes
    raw = type(memory) is RunningMoments
    # n / (n - 1) makes the variance unbiased. Infinity marks it as undefined: the library skips what is not finite.
    factor = 1.0 if raw else count / (count - 1) if count > 1 else float("inf")
    pointers = start + step, start + 2 * step, mean.data_ptr(), var.data_ptr()
    checked(ready.remember(mean.numel(), TYPES[ready.wide], ready.arrays, memory.momentum, factor, raw, *pointers))
    torch.autograd.graph.increment_version((mean, var))  # the library wrote behind autograd's back
