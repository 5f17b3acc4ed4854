"""Memory: running averages of statistics, for use when the batch's own must not be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.core.moments import Moments
from normkit.core.support import Split, per_shape, place


class RunningStatistics(NamedTuple):
    """The buffers of a module with memory: mean and unbiased variance per channel, and how many batches were seen.

    Of a rule without a scale the variance is not kept, and ``var`` is a tensor without elements.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor | None = None


@dataclass(frozen=True)
class Running:
    """running <- (1 - momentum) running + momentum * statistic, once a training batch, with the unbiased variance.

    A batch without elements, or whose statistic of a channel is not finite, leaves that channel as it was: one broken batch
    does not poison the average.

    Args:
        momentum: weight of the new value, 0 to 1; None gives the cumulative average 1 / batches.
        per: the axes that running statistics keep, in the notation of Support; statistics are averaged over the others.

    Reference:
        Ioffe and Szegedy, "Batch Normalization" (2015), https://arxiv.org/abs/1502.03167.

    >>> statistics = RunningStatistics(torch.zeros(1), torch.ones(1))
    >>> split = Split((4, 1), ("n", "c"), (0,))
    >>> Running(momentum=0.5).update(statistics, Moments(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 4), split)
    >>> statistics
    RunningStatistics(mean=tensor([1.]), var=tensor([2.5000]), batches=None)
    """

    momentum: float | None = 0.1
    per: str = "c"

    def update(self, running: RunningStatistics, new: Moments, split: Split) -> None:
        """Take one batch's moments, given with reduced axes of size 1, into the running statistics, in place."""
        if 0 in split.shape:
            if running.batches is not None:
                running.batches.add_(1)
            return
        mean, var = new.mean.detach(), new.var.detach()
        if isinstance(new.n, Tensor):  # a set that a mask left empty has neither
            mean, var = (torch.where(new.n > 0, value, math.nan) for value in (mean, var))
        self.blend(running, *self._per_channel(Moments(mean, var, new.n), split))

    def _per_channel(self, new: Moments, split: Split) -> tuple[Tensor, Tensor]:
        return self._reduce(new.mean, split), self._reduce(new.unbiased(), split)

    def blend(self, running: RunningStatistics, mean: Tensor, var: Tensor) -> None:
        """Take one mean and one variance per channel, without gradients, into the running statistics in place."""
        weight = self._weight(running)
        mean, var = mean.to(running.mean.dtype), var.to(running.var.dtype)
        finite = mean.isfinite() & var.isfinite()
        for buffer, fresh in ((running.mean, mean), (running.var, var)):
            buffer.lerp_(torch.where(finite, fresh, buffer), weight)

    def _weight(self, running: RunningStatistics) -> float | Tensor:
        if running.batches is not None:
            running.batches.add_(1)
        if self.momentum is not None:
            return self.momentum
        assert running.batches is not None
        return 1.0 / running.batches.to(running.mean.dtype)

    def _reduce(self, value: Tensor, split: Split) -> Tensor:
        keep = [d for d, name in enumerate(split.names) if name in self.per.replace("(", " ").replace(")", " ").split()]
        others = tuple(d for d in range(value.dim()) if d not in keep)
        # A set without elements, as of a wholly masked sample, has no mean; the others still have theirs.
        apart = any(value.shape[d] > 1 for d in others)
        return (value.nanmean(others) if apart else value).reshape(per_shape(self.per, split))


@dataclass(frozen=True)
class RunningMoments(Running):
    """Running averages of the first and second raw moment, E[x] and E[x^2], kept as mean and population variance.

    running <- (1 - momentum) running + momentum * moment, for both. Kept as their difference the second moment does not lose
    the variance beside a large mean: with d the change from the old mean to the batch's,

        mean <- mean + momentum d,    var <- (1 - momentum) var + momentum Var[x] + momentum (1 - momentum) d^2.

    Unlike an average of variances it holds the variance of the means between batches too.

    Reference:
        Summers and Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization" (2020),
        https://arxiv.org/abs/1906.03548, section 3.1.

    >>> statistics = RunningStatistics(torch.zeros(1), torch.ones(1))
    >>> split = Split((4, 1), ("n", "c"), (0,))
    >>> RunningMoments(momentum=0.5).update(statistics, Moments(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 4), split)
    >>> statistics  # E[x^2] is (1 + 7) / 2 = 4
    RunningStatistics(mean=tensor([1.]), var=tensor([3.]), batches=None)
    """

    momentum: float | None = 0.01

    def _per_channel(self, new: Moments, split: Split) -> tuple[Tensor, Tensor]:
        mean = self._reduce(new.mean, split)
        return mean, self._reduce(new.var + (new.mean - place(mean, self.per, split)).square(), split)

    def blend(self, running: RunningStatistics, mean: Tensor, var: Tensor) -> None:
        """Take one mean and one population variance per channel, without gradients, into the running statistics in place."""
        weight = self._weight(running)
        mean, var = mean.to(running.mean.dtype), var.to(running.var.dtype)
        finite = mean.isfinite() & var.isfinite()
        change = mean - running.mean
        mixed = running.var + weight * (var - running.var) + weight * (1 - weight) * change.square()
        running.var.copy_(torch.where(finite, mixed, running.var))
        running.mean.copy_(torch.where(finite, running.mean + weight * change, running.mean))


@dataclass(frozen=True)
class RunningMean(Running):
    """running <- (1 - momentum) running + momentum * mean, for rules that do not scale; there is no variance.

    >>> statistics = RunningStatistics(torch.zeros(1), torch.empty(0))
    >>> split = Split((4, 1), ("n", "c"), (0,))
    >>> RunningMean(momentum=0.5).update(statistics, Moments(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 4), split)
    >>> statistics.mean
    tensor([1.])
    """

    def _per_channel(self, new: Moments, split: Split) -> tuple[Tensor, Tensor]:
        return self._reduce(new.mean, split), new.mean.new_empty(0)

    def blend(self, running: RunningStatistics, mean: Tensor, var: Tensor) -> None:
        """Take one mean per channel, without gradients, into the running mean in place; ``var`` is not read."""
        weight = self._weight(running)
        mean = mean.to(running.mean.dtype)
        running.mean.copy_(torch.where(mean.isfinite(), running.mean + weight * (mean - running.mean), running.mean))
