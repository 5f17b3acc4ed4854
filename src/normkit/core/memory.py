"""Memory: running averages of statistics, used where the batch's own statistics must not be."""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, maybe_get_level

from normkit.core.errors import BackendError
from normkit.core.moments import Moments, accumulation_dtype
from normkit.core.support import Split, check_shape, per_shape, place


class RunningStatistics(NamedTuple):
    """The buffers of a module with memory: mean and unbiased variance per channel, and the number of batches seen.

    A rule without a scale keeps no variance: ``var`` is then an empty tensor.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor | None = None


def _check_levels(kept: Tensor, new: Tensor) -> None:
    """Refuse to write statistics that ``vmap`` maps over into buffers that it does not map over."""
    if not torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return
    if _mapped(new) - _mapped(kept):
        raise BackendError(
            "vmap would write the running statistics of all its inputs into the same buffers; wanted mapped buffers, or none to "
            "update: make the norm with track_running_stats=False where it has that option, call eval(), or "
            "torch.func.replace_all_batch_norm_modules_(model), which handles batch norms only"
        )


def _mapped(tensor: Tensor) -> set[int]:
    """The levels of ``vmap`` at which a tensor is batched."""
    levels = set()
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            levels.add(maybe_get_level(tensor))
        tensor = get_unwrapped(tensor)
    return levels


def recomputed() -> bool:
    """Whether a backward pass is running: a layer is then called again by activation checkpointing, of either kind."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


class Recall:
    """The statistics by which recent training passes normalized, for activation checkpointing, which runs a pass again.

    Running statistics have moved on by then, so copies are kept, found again by the mean of the pass's batch: the nearest, as
    another back end may round it otherwise. Copies of a layer and pickles begin with none.
    """

    def __init__(self) -> None:
        # 32 passes before their backward passes, as in accumulation and pipelines; each is three numbers per channel.
        self._kept: deque[tuple[Tensor, ...]] = deque(maxlen=32)

    def used(self, batch: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
        """These statistics in a first pass over a batch with this mean; in a recomputation those of its first pass."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return statistics
        batch = batch.detach()
        if not recomputed():
            self._kept.appendleft((batch, *(each.detach().clone() for each in statistics)))
        elif self._kept:
            apart = torch.stack([(kept[0] - batch).abs().amax() for kept in self._kept])
            return self._kept[int(apart.argmin())][1:]
        return statistics

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Recall, ()


@dataclass(frozen=True)
class Running:
    """running <- (1 - momentum) running + momentum * statistic, once per training batch, with the unbiased variance.

    The update is computed in at least float32 by torch.lerp, which is exact for the momenta 0 and 1, and then rounded to the
    dtype of the running statistics. A channel whose result is not finite keeps its old value, and a batch without elements
    changes no channel; such batches still count. The cumulative average skips and does not count a batch without elements or with
    a non-finite result in any channel. What activation checkpointing computes again does not enter twice.

    Args:
        momentum: weight of the new value, 0 to 1; None gives the cumulative average 1 / batches.
        per: the axes that running statistics keep, in the notation of Support; statistics are averaged over the others.

    Reference: Ioffe and Szegedy, "Batch Normalization" (2015), https://arxiv.org/abs/1502.03167.

    >>> statistics = RunningStatistics(torch.zeros(1), torch.ones(1))
    >>> split = Split((4, 1), ("n", "c"), (0,))
    >>> Running(momentum=0.5).update(statistics, Moments(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 4), split)
    >>> statistics
    RunningStatistics(mean=tensor([1.]), var=tensor([2.5000]), batches=None)
    """

    momentum: float | None = 0.1
    per: str = "c"

    def update(self, running: RunningStatistics, new: Moments, split: Split) -> None:
        """Update the running statistics in place by one batch's moments, whose reduced axes have size 1."""
        if 0 in split.shape:
            if not recomputed() and running.batches is not None and self.momentum is not None:
                running.batches.add_(1)
            return
        mean, var = new.mean.detach(), new.var.detach()
        if isinstance(new.n, Tensor):  # a set that a mask empties has neither
            mean, var = (torch.where(new.n > 0, value, math.nan) for value in (mean, var))
        self.blend(running, *self._per_channel(Moments(mean, var, new.n), split))

    def _per_channel(self, new: Moments, split: Split) -> tuple[Tensor, Tensor]:
        return self._reduce(new.mean, split), self._reduce(new.unbiased(), split)

    def blend(self, running: RunningStatistics, mean: Tensor, var: Tensor) -> None:
        """Blend one mean and one variance per channel, without gradients, into the running statistics, in place."""
        if recomputed():
            return
        _check_levels(running.mean, mean)
        check_shape("running statistics", "the mean", running.mean, *mean.shape)
        if not isinstance(self, RunningMean):
            check_shape("running statistics", "the variance or deviation", running.var, *var.shape)
        wide, batches = accumulation_dtype(running.mean.dtype), running.batches
        if self.momentum is None:
            assert batches is not None
            weight: float | Tensor = 1.0 / (batches + 1).to(
                wide
            )  # a tensor, as reading the count would wait for the device
        else:
            weight = self.momentum
        mixed = self._mixed(running.mean.to(wide), running.var.to(wide), mean.to(wide), var.to(wide), weight)
        # Not strict: a memory of the mean alone mixes one value, and its variance stays empty.
        rounded = [value.to(buffer.dtype) for value, buffer in zip(mixed, running[:2], strict=False)]
        # Mean and variance of a channel are replaced together or not at all; where the buffers' dtype overflows counts too.
        fits = torch.stack([value.isfinite() for value in rounded]).all(0)
        if self.momentum is None:
            fits = fits.all()
        # By torch.where, not by an index: no value is read on the host, and a compiler sees fixed shapes.
        for value, buffer in zip(rounded, running[:2], strict=False):
            buffer.copy_(torch.where(fits, value, buffer))
        if batches is not None:
            batches.add_(1 if self.momentum is not None else fits)

    def _mixed(
        self, old_mean: Tensor, old_var: Tensor, mean: Tensor, var: Tensor, weight: float | Tensor
    ) -> tuple[Tensor, ...]:
        return torch.lerp(old_mean, mean, weight), torch.lerp(old_var, var, weight)

    def _reduce(self, value: Tensor, split: Split) -> Tensor:
        keep = [d for d, name in enumerate(split.names) if name in self.per.replace("(", " ").replace(")", " ").split()]
        others = tuple(d for d in range(value.dim()) if d not in keep)
        # A set without elements, as of a fully masked sample, has the mean NaN; the average is over the others.
        apart = any(value.shape[d] > 1 for d in others)
        return (value.nanmean(others) if apart else value).reshape(per_shape(self.per, split))


@dataclass(frozen=True)
class RunningMoments(Running):
    """Running averages of the first and second raw moment, E[x] and E[x^2], stored as mean and population variance.

    running <- (1 - momentum) running + momentum * moment, for both. Stored this way, a small variance is not lost next to a large
    mean. With d the difference between the batch's mean and the old one,

        mean <- mean + momentum d,    var <- (1 - momentum) var + momentum Var[x] + momentum (1 - momentum) d^2.

    Unlike an average of variances, it includes the variance between the batch means.

    Reference: Summers and Dinneen (2020), https://arxiv.org/abs/1906.03548, section 3.1.

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

    def _mixed(
        self, old_mean: Tensor, old_var: Tensor, mean: Tensor, var: Tensor, weight: float | Tensor
    ) -> tuple[Tensor, ...]:
        change = mean - old_mean
        # In this order a change whose square would overflow contributes 0 where the weight is 0 or 1, not NaN.
        between = weight * (1 - weight) * change * change
        return torch.lerp(old_mean, mean, weight), torch.lerp(old_var, var, weight) + between


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

    def _mixed(
        self, old_mean: Tensor, old_var: Tensor, mean: Tensor, var: Tensor, weight: float | Tensor
    ) -> tuple[Tensor, ...]:
        return (torch.lerp(old_mean, mean, weight),)
