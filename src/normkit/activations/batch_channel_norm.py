"""Batch-channel normalization, and batch normalization by estimated statistics for micro-batches."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError
from normkit.core.memory import Recall, Running, RunningMoments, RunningStatistics
from normkit.core.module import Module, TorchBatchNorm
from normkit.core.moments import accumulation_dtype, moments
from normkit.core.place import groups
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Support, check_groups, check_shape, place
from normkit.engine.dispatch import run
from normkit.engine.layer import check_channels, check_several

_AFFINE = Affine("c")
_SUPPORT = Support("n c *", over="n *")


class EstBatchNorm(Module, TorchBatchNorm):
    """Normalize each channel by running statistics, in training too, which each batch first moves a little.

    mean <- (1 - momentum) mean + momentum E[x],  var <- (1 - momentum) var + momentum E[(x - old mean)^2], without gradient;
    y = weight * (x - mean) / sqrt(var + eps) + bias. Estimates from many micro-batches, even of a single image, are as good as
    those of a large batch; gradients do not flow through them. Lower ``momentum`` along with the learning rate.

    Under activation checkpointing the recomputation normalizes by the statistics of the first pass, of the last 32.

    ``eps``, ``momentum`` and ``affine``, and the shape with channels first, are those of BatchNorm; OptionError is raised unless
    the momentum is from 0 to 1, or None, which averages all batches so far with equal weight.

    Reference: Qiao, Wang, Liu, Shen, Yuille (2019), https://arxiv.org/abs/1911.09738, section 4.2.

    >>> norm = EstBatchNorm(1, momentum=0.5)
    >>> norm(torch.tensor([[2.0]])).detach()  # mean 1, var (1 + 4) / 2
    tensor([[0.6325]])
    """

    in_training = "its estimates; leave the layer out, or replace it by BatchNorm first"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if momentum is not None:
            _check_momentum("EstBatchNorm", momentum)
        super().__init__(num_features, eps, momentum, affine, True, device=device, dtype=dtype)
        self._recall = Recall()
        _ = self._rules  # made now, as a compiler would trace their making

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        check_channels("EstBatchNorm", input, self.num_features, "num_features", "n c *")
        affine = self.weight, self.bias
        return _estimated(self._rules[0], input, _running(self), *affine, self.training, mask, self._recall)

    @property
    def _rules(self) -> tuple[Rule, Rule]:
        return _kept_rules(self, 1)


class BatchChannelNorm(Module, TorchBatchNorm):
    """Batch normalization, then normalize each sample over groups of channels and all positions.

    z = weight * (x - E_c[x]) / sqrt(Var_c[x] + eps) + bias per channel c over the batch, then
    y = group_weight * (z - E_g[z]) / sqrt(Var_g[z] + eps) + group_bias per sample and group g: this affine is per group. The
    first step keeps channels from dying, which normalizing over channels alone does not; the second compensates noisy batches.

    ``eps``, ``momentum`` and ``affine``, the shape with channels first, and the errors of shapes are those of BatchNorm, with eps
    and affine for both steps.

    Args:
        num_groups: groups G; OptionError unless it divides ``num_features``. Default: 32.
        estimate: for micro-batches, use running statistics in the first step, as EstBatchNorm does. Default: False.

    Reference: Qiao, Wang, Liu, Shen, Yuille (2019), https://arxiv.org/abs/1903.10520, section 3.

    >>> BatchChannelNorm(2, num_groups=1)(torch.tensor([[1.0, 4.0], [3.0, 0.0]])).detach()
    tensor([[-1.0000,  1.0000],
            [ 1.0000, -1.0000]])
    """

    shown = "{0.num_features}, num_groups={0.num_groups}, eps={0.eps}, momentum={0.momentum}, affine={0.affine}"
    unusual: ClassVar = {"estimate": False}
    always = "its second step, over groups of channels; leave the layer out"

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        estimate: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if momentum is not None:
            _check_momentum("BatchChannelNorm", momentum)
        check_groups("BatchChannelNorm", num_features, num_groups)
        super().__init__(num_features, eps, momentum, affine, True, device=device, dtype=dtype)
        self.num_groups, self.estimate = num_groups, estimate
        factory = {"device": device, "dtype": dtype}
        self.group_weight = nn.Parameter(torch.ones(num_groups, **factory)) if affine else None
        self.group_bias = nn.Parameter(torch.zeros(num_groups, **factory)) if affine else None
        self._recall = Recall()
        _ = self._rules  # made now, as a compiler would trace their making

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        check_channels("BatchChannelNorm", input, self.num_features, "num_features", "n c *")
        if self.training and not self.estimate:
            check_several("BatchChannelNorm", input, _SUPPORT)
        affines = (self.weight, self.bias), (self.group_weight, self.group_bias)
        how = self.training, self.estimate, mask, self._recall
        return _batch_channel(self._rules, input, _running(self), affines, *how)

    @property
    def _rules(self) -> tuple[Rule, Rule]:
        return _kept_rules(self, self.num_groups)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.fill(group_weight=1, group_bias=0)


def est_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch normalization by estimated statistics as a function; in training it updates them first. See EstBatchNorm.

    >>> est_batch_norm(torch.tensor([[2.0]]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
    tensor([[0.5000]])
    """
    _check_momentum("est_batch_norm", momentum)
    rule, _ = _make_rules(1, eps, momentum)
    return _estimated(rule, input, RunningStatistics(running_mean, running_var), weight, bias, training, mask)


def batch_channel_norm(
    input: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    group_weight: Tensor | None = None,
    group_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    estimate: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch-channel normalization as a function; in training it updates the running statistics. See BatchChannelNorm.

    >>> x, zero, one = torch.tensor([[1.0, 4.0], [3.0, 0.0]]), torch.zeros(2), torch.ones(2)
    >>> batch_channel_norm(x, 1, zero, one, training=True)
    tensor([[-1.0000,  1.0000],
            [ 1.0000, -1.0000]])
    """
    _check_momentum("batch_channel_norm", momentum)
    check_groups("batch_channel_norm", input.shape[1], num_groups)
    if training and not estimate:
        check_several("batch_channel_norm", input, _SUPPORT)
    running, affines = RunningStatistics(running_mean, running_var), ((weight, bias), (group_weight, group_bias))
    return _batch_channel(_make_rules(num_groups, eps, momentum), input, running, affines, training, estimate, mask)


def _make_rules(groups: int, eps: float, momentum: float | None) -> tuple[Rule, Rule]:
    statistic = Statistic("mean", "std", eps)
    channel = Rule(Support("n (g c) *", over="c *", g=groups), statistic, Affine("g"))
    return Rule(_SUPPORT, statistic, _AFFINE, Running(momentum)), channel


def _kept_rules(module: TorchBatchNorm, groups: int) -> tuple[Rule, Rule]:
    state = groups, module.__dict__["eps"], module.momentum
    if module.__dict__.get("_made_of") != state:
        module.__dict__["_made"], module.__dict__["_made_of"] = _make_rules(*state), state
    return module.__dict__["_made"]


def _running(module: TorchBatchNorm) -> RunningStatistics:
    assert module.running_mean is not None
    assert module.running_var is not None
    return RunningStatistics(module.running_mean, module.running_var, module.num_batches_tracked)


def _estimated(
    rule: Rule,
    x: Tensor,
    running: RunningStatistics,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    mask: Tensor | None,
    recall: Recall | None = None,
) -> Tensor:
    split = rule.support.split(x.shape)
    wide = x.to(accumulation_dtype(x.dtype))
    if mask is not None:
        mask = mask.expand(x.shape)
        wide = torch.where(mask, wide, 0.0)
    for name, statistic in (("running_mean", running.mean), ("running_var", running.var)):
        check_shape("est_batch_norm", name, statistic, x.shape[1])
    kept = running[:2]
    if training:
        assert rule.memory is not None
        found = moments(wide.detach(), split.dims, mask)
        mean = found.mean.reshape(-1)
        if isinstance(found.n, Tensor):  # a channel without elements changes nothing
            mean = torch.where(found.n.reshape(-1) > 0, mean, math.nan)
        var = found.var.reshape(-1)
        if rule.memory.momentum is None:
            # The first batch replaces the initial mean, so deviations from that must not enter; raw moments merge exactly.
            RunningMoments(None).blend(running, mean, var)
        else:
            rule.memory.blend(running, mean, var + (mean - running.mean).square())
        if recall is not None:
            kept = recall.used(found.mean, *kept)
    mean, var = (place(value, "c", split).to(wide.dtype) for value in kept)
    y = _AFFINE.apply((wide - mean) / rule.statistic.guarded(var, power=2), split, weight, bias)
    return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype)


def _batch_channel(
    rules: tuple[Rule, Rule],
    x: Tensor,
    running: RunningStatistics,
    affines: tuple[tuple[Tensor | None, Tensor | None], ...],
    training: bool,
    estimate: bool,
    mask: Tensor | None,
    recall: Recall | None = None,
) -> Tensor:
    z = x.to(accumulation_dtype(x.dtype))  # a half type must not round between the two steps
    if estimate:
        z = _estimated(rules[0], z, running, *affines[0], training, mask, recall)
    else:
        z = run(rules[0], z, *affines[0], running=running, training=training, mask=mask)
    return run(rules[1], z, *affines[1], mask=mask).to(x.dtype)


def _check_momentum(who: str, momentum: float | None) -> None:
    if momentum is None or not 0 <= momentum <= 1:
        raise OptionError(f"{who}: momentum={momentum}; wanted a number from 0 to 1")


CARD = Card(
    title="Batch-channel normalization",
    word="bcn",
    normalized_over="each channel over the batch and all positions, then each sample's groups of channels",
    formula="y = group_weight * GroupNorm(weight * (x - E[x]) / sqrt(Var[x] + eps) + bias) + group_bias",
    paper=paper("qiao2019microbatch"),
    use_cases="detection and segmentation with few samples per batch, along with weight standardization",
    strengths="keeps channels from dying as batch normalization does, and stabilizes small batches as group normalization does",
    weaknesses="two normalizations per layer, of which the second can't be folded",
    module=BatchChannelNorm,
    functional=batch_channel_norm,
    make=lambda channels: BatchChannelNorm(channels, math.gcd(2, channels)),
    build=lambda at: BatchChannelNorm(at.channels, at.groups, at.eps, at.momentum, at.affine, **at.factory),
    option=groups(of=lambda norm: norm.num_groups),
    over="n c *",
    running_state=True,
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift"}),
)

CARD_ESTIMATED = Card(
    title="Batch normalization by estimated statistics",
    word="ebn",
    normalized_over="each channel, by running statistics that the batch first moves a little",
    formula="y = weight * (x - mean) / sqrt(var + eps) + bias, mean and var running",
    paper=paper("qiao2019rethinking"),
    use_cases="micro-batches of one or two images, as the first step of batch-channel normalization",
    strengths="works with a single sample per batch; training computes what inference does",
    weaknesses="gradients ignore the statistics; the momentum has to fall with the learning rate",
    module=EstBatchNorm,
    functional=est_batch_norm,
    build=lambda at: EstBatchNorm(at.channels, at.eps, at.momentum, at.affine, **at.factory),
    over="n *",
    running_state=True,
    train_equals_eval=True,
    exact_gradient=False,
    foldable=True,
)
