"""Memory: running averages of statistics, for use when the batch's own must not be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.core.moments import Moments
from normkit.core.support import Split, per_shape


class RunningStatistics(NamedTuple):
    """The buffers of a module with memory: mean and unbiased variance per channel, and how many batches were seen."""

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

    @torch.no_grad()
    def update(self, running: RunningStatistics, new: Moments, split: Split) -> None:
        """Take one batch's moments, given with reduced axes of size 1, into the running statistics, in place."""
        if running.batches is not None:
            running.batches.add_(1)
        weight: float | Tensor
        if self.momentum is not None:
            weight = self.momentum
        else:
            assert running.batches is not None
            weight = 1.0 / running.batches.to(running.mean.dtype)
        if 0 in split.shape:
            return
        for buffer, value in ((running.mean, new.mean), (running.var, new.unbiased())):
            fresh = self._reduce(value, split).to(buffer.dtype)
            buffer.copy_(torch.where(fresh.isfinite(), buffer + weight * (fresh - buffer), buffer))

    def _reduce(self, value: Tensor, split: Split) -> Tensor:
        keep = [d for d, name in enumerate(split.names) if name in self.per.replace("(", " ").replace(")", " ").split()]
        others = tuple(d for d in range(value.dim()) if d not in keep)
        return (value.mean(others) if others else value).reshape(per_shape(self.per, split))
