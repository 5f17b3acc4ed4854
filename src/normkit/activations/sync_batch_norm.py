"""Synchronized batch normalization: normalize each channel over the batches of all processes and all positions."""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.errors import ShapeError
from normkit.core.memory import RunningStatistics
from normkit.core.module import TorchBatchNorm
from normkit.core.moments import Moments, accumulation_dtype, moments
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Split, show
from normkit.engine.dispatch import Activation, Backend, Explanation, run
from normkit.engine.layer import Layer, channels_rule, check_channels, check_several, given_statistics
from normkit.engine.reference import activate

sync_batch_norm_rule = partial(channels_rule, "SyncBatchNorm", "n *")  # n counts the samples of all processes


class SyncBatchNorm(Layer, TorchBatchNorm):
    """Normalize each channel over the batches of all processes, on any device and backend of torch.distributed.

    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias, with E and Var (population) over the union of the processes' batches in
    training. Batches may differ in size, and some may be empty; every process must call forward and backward alike. Each
    process's count, mean and variance are gathered once and merged; the backward pass sums two numbers per channel. Running
    statistics are the same in all processes; gradients of weight and bias are those of the local batch, as
    DistributedDataParallel expects. Without a process group, with one process, and in evaluation it is batch normalization.

    ``torch.nn.SyncBatchNorm``, but also on CPU: same arguments, defaults and state_dict. Replace channels-last layers by hand,
    with the same layout: ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` knows no layout, and is refused.

    ``eps``, ``momentum``, ``affine``, ``track_running_stats``, ``bias``, ``layout`` and ``activation``, the shapes and the errors
    are those of BatchNorm; one value per channel is refused where it is the only one of all processes.

    Args:
        process_group: the processes that share statistics. Default: all.

    Reference: Merging follows Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983),
    https://doi.org/10.1080/00031305.1983.10483115; the method Ioffe and Szegedy (2015), https://arxiv.org/abs/1502.03167.

    >>> norm = SyncBatchNorm(1, momentum=0.5)
    >>> norm(torch.tensor([[1.0], [3.0]])).detach().T
    tensor([[-1.0000,  1.0000]])
    """

    unusual: ClassVar = {"layout": "n c *", "activation": None}

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        layout: str = "n c *",
        activation: Activation | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group, self.layout, self.activation = process_group, layout, activation
        self.complete(bias)

    def make_rule(self) -> Rule:
        return sync_batch_norm_rule(self.__dict__["eps"], self.momentum, self.layout, self.track_running_stats)

    def check(self, input: Tensor) -> None:
        check_channels("SyncBatchNorm", input, self.num_features, "num_features", self.layout)
        if (self.training or self.running_mean is None) and not _several(self.process_group):
            check_several("SyncBatchNorm", input, self.rule.support)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if not (self.training or self.running_mean is None) or not _several(self.process_group):
            return super().forward(input, mask)
        self.check(input)
        running = self.running() if self.track_running_stats else None
        y = _synchronized(self.rule, input, self.weight, self.bias, running, mask, self.process_group)
        return activate(y, self.activation)

    def explain(self, input: Tensor) -> Explanation:
        """Say which back end would normalize this input, and why: batch normalization's, unless processes share statistics."""
        found = super().explain(input)
        if not (self.training or self.running_mean is None) or not _several(self.process_group):
            return found
        return replace(found, backend="closed", why="the statistics are of all processes together")


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    process_group: Any = None,
    layout: str = "n c *",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Synchronized batch normalization in training as a function; it updates running statistics that are given.

    ``backend`` applies where there is one process, as for batch normalization. See SyncBatchNorm.

    >>> sync_batch_norm(torch.tensor([[1.0], [3.0]])).T
    tensor([[-1.0000,  1.0000]])
    """
    running = given_statistics("sync_batch_norm", running_mean, running_var)
    rule = sync_batch_norm_rule(eps, momentum, layout, running_mean is not None)
    if _several(process_group):
        return _synchronized(rule, input, weight, bias, running, mask, process_group)
    check_several("sync_batch_norm", input, rule.support)
    return run(rule, input, weight, bias, running=running, mask=mask, backend=backend)


def _several(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _synchronized(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: RunningStatistics | None,
    mask: Tensor | None,
    group: Any,
) -> Tensor:
    split = rule.support.split(x.shape)
    accumulation_dtype(x.dtype)  # refuses integers before anything is computed
    if mask is not None:
        mask = mask.expand(x.shape).reshape(split.shape)
    y, _, mean, var, n = _Synchronized.apply(x.reshape(split.shape), split, rule.statistic, mask, group)
    if n.device.type == "cpu" and bool((n == 1).any()):  # on other devices the check would wait for the device
        raise ShapeError(
            f"SyncBatchNorm: one value for each statistic in all processes together (input here {show(x.shape)}); its "
            "variance is undefined. Expected more than 1 value per channel when training: use larger batches, or .eval()"
        )
    if weight is not None or bias is not None:
        assert rule.compensation is not None
        y = rule.compensation.apply(y, split, weight, bias)
        y = y if mask is None else torch.where(mask, y, 0.0)
    elif y.dtype == x.dtype:
        y = y.clone()  # the backward pass needs y, and a caller may write into its output
    if running is not None and rule.memory is not None:
        rule.memory.update(running, Moments(mean, var, n), Split(split.statistics_shape, split.names, split.dims))
    return y.reshape(x.shape).to(x.dtype)


class _Synchronized(torch.autograd.Function):
    """(normalized, 1 / scale, mean, variance, count) over all processes; the last three without gradient."""

    @staticmethod
    def forward(
        x: Tensor, split: Split, statistic: Statistic, mask: Tensor | None, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x = x.to(accumulation_dtype(x.dtype))
        shape = split.statistics_shape
        if x.numel():
            x = x if mask is None else torch.where(mask, x, 0.0)
            found = moments(x, split.dims, mask)
            count = torch.as_tensor(found.n, dtype=x.dtype, device=x.device).expand(shape)
            local = torch.stack([count, found.mean, found.var])
        else:
            local = x.new_zeros(3, *shape)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local, group=group)
        counts, means, variances = torch.stack(parts, 1)
        n = counts.sum(0)
        share = counts / n.clamp_min(1)
        mean = (share * means).sum(0)
        mean = mean + (share * (means - mean)).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        inverse = statistic.guarded(var, power=2).reciprocal()
        y = (x - mean) * inverse
        return y if mask is None else torch.where(mask, y, 0.0), inverse, mean, var, n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.split, _, mask, ctx.group = inputs
        y, inverse, mean, var, n = output
        ctx.dtype = x.dtype
        ctx.mark_non_differentiable(mean, var, n)
        ctx.save_for_backward(y, inverse, n, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        y, inverse, n, mask = ctx.saved_tensors
        dy, di, dims = gradients[0], gradients[1], ctx.split.dims
        if mask is not None:
            dy = torch.where(mask, dy, 0.0)
        sums = torch.stack([dy.sum(dims, keepdim=True), (dy * y).sum(dims, keepdim=True) + inverse * di])
        shift, along = _Sum.apply(sums, ctx.group) / n.clamp_min(1)
        dx = inverse * (dy - shift - y * along)
        return (dx if mask is None else torch.where(mask, dx, 0.0)).to(ctx.dtype), None, None, None, None


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradients[0], ctx.group), None


CARD = Card(
    title="Synchronized batch normalization",
    word="sync",
    normalized_over="each channel, over the batches of all processes and all positions",
    paper=paper("ioffe2015batch"),
    use_cases="detection, segmentation and other training with few samples on each of several devices",
    strengths="the same statistics for any number of devices; batches may be uneven, or empty",
    weaknesses="each layer waits for all processes, once forward and once backward",
    module=SyncBatchNorm,
    functional=sync_batch_norm,
    build=lambda at: SyncBatchNorm(
        at.channels, at.eps, at.momentum, at.affine, bias=at.bias, layout=at.axes, **at.factory
    ),
    axes=("n c *", "n * c"),
    rule=sync_batch_norm_rule(),
    running_state=True,
    foldable=True,
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift"}),
)
