"""Batch renormalization: batch normalization corrected towards its running statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError
from normkit.core.memory import Recall, Running, RunningStatistics
from normkit.core.moments import accumulation_dtype
from normkit.core.place import Place, whole_number
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, place
from normkit.engine.dispatch import Backend, Explanation, explain, run_measured
from normkit.engine.layer import Layer, check_channels, check_layout, check_several

_AFFINE = Affine("c")


@dataclass(frozen=True)
class RenormSchedule:
    """Bounds of the correction, by the number of training steps.

    r_max rises from 1 and d_max from 0, both at step ``start``, linearly to their final values at ``r_end`` and ``d_end``. The
    defaults are the paper's, for a run of about 100,000 steps.

    Args:
        r_max: final bound of the scale, which stays between 1 / r_max and r_max. Default: 3.
        d_max: final bound of the shift. Default: 5.
        start: steps of plain batch normalization. Default: 5000.
        r_end: step at which r_max is reached. Default: 40000.
        d_end: step at which d_max is reached. Default: 25000.

    Raises:
        OptionError: r_max below 1, d_max below 0, or an end before the start.

    Reference: Ioffe, "Batch Renormalization" (2017), https://arxiv.org/abs/1702.03275, section 4.

    >>> RenormSchedule()(15000)
    (1.5714285714285714, 2.5)
    """

    r_max: float = 3.0
    d_max: float = 5.0
    start: int = 5000
    r_end: int = 40000
    d_end: int = 25000

    def __post_init__(self) -> None:
        if not (self.r_max >= 1 and self.d_max >= 0 and 0 <= self.start <= min(self.r_end, self.d_end)):
            raise OptionError(f"{self}: wanted r_max >= 1, d_max >= 0 and 0 <= start <= r_end and d_end")

    @classmethod
    def constant(cls, r_max: float = 3.0, d_max: float = 5.0) -> RenormSchedule:
        """Make a schedule with the same bounds at every step.

        >>> RenormSchedule.constant(3, 5)(0)
        (3.0, 5.0)
        """
        return cls(r_max, d_max, 0, 0, 0)

    @classmethod
    def over(cls, steps: int, r_max: float = 3.0, d_max: float = 5.0) -> RenormSchedule:
        """Make a schedule for a run of ``steps`` steps: start at a tenth, d_max at half, r_max at eight tenths.

        >>> RenormSchedule.over(1000)
        RenormSchedule(r_max=3.0, d_max=5.0, start=100, r_end=800, d_end=500)
        """
        return cls(r_max, d_max, round(0.1 * steps), round(0.8 * steps), round(0.5 * steps))

    def __call__(self, step: Any) -> tuple[Any, Any]:
        """The bounds r_max and d_max at a step, given as a number or a tensor."""
        return 1 + (self.r_max - 1) * self._share(step, self.r_end), self.d_max * self._share(step, self.d_end)

    def _share(self, step: Any, end: int) -> Any:
        if self.start == end:
            return (step >= end) * 1.0
        share = (step - self.start) / (end - self.start)
        return share.clamp(0, 1) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)


class BatchRenorm(Layer):
    """Normalize each channel over batch and positions, then correct it, within bounds, to what running statistics would give.

    In training, with the batch's mean m and deviation s = sqrt(Var[x] + eps) and the running ones M and S before this batch,

        y = weight * ((x - m) / s * r + d) + bias,    r = clip(s / S, 1 / r_max, r_max),    d = clip((m - M) / S, -d_max, d_max)

    where r and d are constants in the backward pass. Where nothing is clipped, that is exactly y = weight * (x - M) / S +
    bias, which is what evaluation computes: training and inference agree, even for small or correlated batches. Bounds of 1 and
    0 give batch normalization. M and S (the deviation, not the variance) are running averages. A state_dict of batch
    normalization loads too.

    Under activation checkpointing the recomputation corrects towards the statistics that the first pass found, of the last 32.

    ``eps``, ``affine``, ``bias`` and ``layout``, the shapes and the errors are those of BatchNorm; in the paper eps is 1e-3.

    Args:
        momentum: weight of the new value in the running averages, from 0 to 1. Default: 0.01.
        schedule: the bounds by the number of training steps. Default: the paper's, RenormSchedule().

    Reference: Ioffe, "Batch Renormalization" (2017), https://arxiv.org/abs/1702.03275.

    >>> norm = BatchRenorm(1, schedule=RenormSchedule.constant(r_max=2, d_max=5))
    >>> norm(torch.tensor([[1.0], [5.0]])).detach().T  # the deviation is 2, the running one 1: r = 2, d = 3
    tensor([[1.0000, 5.0000]])
    """

    running_std: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        schedule: RenormSchedule | None = None,
        *,
        bias: bool = True,
        layout: str = "n c *",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise OptionError(f"BatchRenorm: momentum={momentum}; wanted a number from 0 to 1")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.layout = affine, layout
        self.schedule, self._recall = schedule or RenormSchedule(), Recall()
        self.register_affine((num_features,), affine, affine and bias, device=device, dtype=dtype)
        self.register_running((num_features,), "running_mean", "running_std", device=device, dtype=dtype)
        self.complete()

    def make_rule(self) -> Rule:
        self._memory = Running(self.momentum)
        return _rule(self.eps, self.layout)

    def _running(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        return self.running_mean, self.running_std, self.num_batches_tracked

    def check(self, input: Tensor) -> None:
        check_channels("BatchRenorm", input, self.num_features, "num_features", self.layout)
        if self.training:
            check_several("BatchRenorm", input, self.rule.support)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check(input)
        rule, running = self.rule, RunningStatistics(*self._running())
        steps = self._running()[2].to(accumulation_dtype(self.running_std.dtype))
        bounds = self.schedule(steps) if self.training else None
        how = mask, self.backend, self._recall
        return _renormalize(rule, self._memory, input, running, self.weight, self.bias, bounds, *how)

    def explain(self, input: Tensor) -> Explanation:
        """Say which back end would normalize this input, before the correction, and why; evaluation uses plain operators."""
        self.check(input)
        wide = input.to(accumulation_dtype(input.dtype))
        if self.training:
            return replace(explain(self.rule, wide, measured=True, backend=self.backend), formula=CARD.formula)
        found = explain(self.rule, wide)
        told = {"why": "evaluation is by running statistics alone, by plain operators", "backend": "reference"}
        return replace(found, formula="y = weight * (x - running_mean) / running_std + bias", **told)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        var = state_dict.get(f"{prefix}running_var")
        if var is not None and f"{prefix}running_std" not in state_dict:  # batch normalization's
            state_dict[f"{prefix}running_std"] = (state_dict.pop(f"{prefix}running_var") + self.eps).sqrt()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, {self.schedule}"
        return text + self.repr_options(layout="n c *")


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-5,
    *,
    bounds: tuple[float | Tensor, float | Tensor] = (3.0, 5.0),
    batches: Tensor | None = None,
    layout: str = "n c *",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Batch renormalization as a function; in training it updates the running statistics and counts ``batches``.

    ``bounds`` are r_max and d_max; ``running_std`` is a deviation. See BatchRenorm.

    >>> batch_renorm(torch.tensor([[1.0], [5.0]]), torch.tensor([1.0]), torch.tensor([2.0])).T
    tensor([[0., 2.]])
    """
    rule = _rule(eps, layout)
    if training:
        check_several("batch_renorm", input, rule.support)
    running, limits = RunningStatistics(running_mean, running_std, batches), bounds if training else None
    return _renormalize(rule, Running(momentum), input, running, weight, bias, limits, mask, backend)


@remembered
def _rule(eps: float, layout: str) -> Rule:
    return Rule(Support(check_layout("BatchRenorm", layout), over="n *"), Statistic("mean", "std", eps))


def _renormalize(
    rule: Rule,
    memory: Running,
    x: Tensor,
    running: RunningStatistics,
    weight: Tensor | None,
    bias: Tensor | None,
    bounds: tuple[float | Tensor, float | Tensor] | None,
    mask: Tensor | None,
    backend: Backend,
    recall: Recall | None = None,
) -> Tensor:
    """Renormalize by the bounds, or with None as in evaluation; the second running statistic is the deviation."""
    split = rule.support.split(x.shape)
    wide = x.to(accumulation_dtype(x.dtype))
    if bounds is None:
        mean, std = (place(statistic.detach(), "c", split).to(wide.dtype) for statistic in running[:2])
        y = ((wide if mask is None else torch.where(mask, wide, 0.0)) - mean) / std
    else:
        y, found = run_measured(rule, wide, mask=mask, backend=backend)
        used = *running[:2], *(torch.as_tensor(bound, device=x.device) for bound in bounds)
        *kept, r_max, d_max = used if recall is None else recall.used(found.mean, *used)
        mean, std = (place(statistic.detach(), "c", split).to(wide.dtype) for statistic in kept)
        deviation = rule.statistic.guarded(found.var, power=2)
        r_max, d_max = r_max.to(std.dtype), d_max.to(std.dtype)
        r = torch.clamp(deviation / std, 1 / r_max, r_max)
        d = torch.clamp((found.mean - mean) / std, -d_max, d_max)
        y = y * r + d
        if isinstance(found.n, Tensor):  # a channel that a mask leaves without a variance changes nothing
            deviation = torch.where(found.n > 1, deviation, math.nan)
        memory.blend(running, found.mean.reshape(-1), deviation.reshape(-1))
    y = _AFFINE.apply(y, split, weight, bias)
    return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype)


def _example(channels: int) -> BatchRenorm:
    return BatchRenorm(channels, schedule=RenormSchedule.constant(1.5, 1.0))


def _build(at: Place) -> BatchRenorm:
    schedule = RenormSchedule.over(int(at.option)) if at.option else RenormSchedule()
    momentum, how = at.momentum_or(0.01), {"bias": at.bias, "layout": at.axes, **at.factory}
    return BatchRenorm(at.channels, at.eps, momentum, at.affine, schedule, **how)


def _steps(norm: BatchRenorm) -> str:
    return "" if norm.schedule == RenormSchedule() else str(10 * norm.schedule.start)  # it starts at a tenth


CARD = Card(
    title="Batch renormalization",
    word="renorm",
    normalized_over="each channel, over the batch and all positions, then moved towards running statistics",
    formula="y = weight * ((x - E[x]) / sqrt(Var[x] + eps) * r + d) + bias, r and d clipped",
    paper=paper("ioffe2017batch"),
    use_cases="networks with batch normalization where batches are small or not drawn independently",
    strengths="training computes what inference does, once the bounds are wide",
    weaknesses="a schedule of bounds to choose; batches of a few samples still estimate poorly",
    module=BatchRenorm,
    functional=batch_renorm,
    make=_example,
    build=_build,
    option=whole_number("STEPS", None, of=_steps),
    axes=("n c *", "n * c"),
    over="n *",
    running_state=True,
    exact_gradient=False,
    foldable=True,
)
