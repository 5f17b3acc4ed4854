"""Ghost batch normalization: normalize each channel over sub-batches of the batch."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, check_options
from normkit.core.memory import Running, RunningMoments, RunningStatistics
from normkit.core.module import TorchBatchNorm, whole
from normkit.core.moments import Moments
from normkit.core.place import whole_number
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.engine.dispatch import Backend, Explanation, explain, run
from normkit.engine.layer import Layer, check_channels, check_layout, check_several, given_statistics
from normkit.engine.sub_batches import explain_in_sub_batches, run_in_sub_batches

Memory = Literal["mean", "sequential", "moments"]


@remembered
def ghost_batch_norm_rule(
    ghost_batch_size: int = 16,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    layout: str = "n c *",
    memory: Memory = "mean",
) -> Rule:
    """Ghost batch normalization of a batch that divides into sub-batches, as data."""
    support = Support(check_layout("GhostBatchNorm", layout).replace("n", "(b n)"), over="n *", n=ghost_batch_size)
    check_options("ghost_batch_norm", memory=(memory, Memory))
    running = RunningMoments(momentum) if memory == "moments" else Running(momentum)
    return Rule(support, Statistic("mean", "std", eps), Affine("c"), running)


class GhostBatchNorm(Layer, TorchBatchNorm):
    """Normalize each channel over the positions of sub-batches of ``ghost_batch_size`` samples, with one weight and bias.

    y = weight * (x - E_b[x]) / sqrt(Var_b[x] + eps) + bias, with E_b and Var_b over sub-batch b in training, and running
    averages in evaluation. Sub-batches are consecutive samples, random if the loader shuffles, or drawn at random with
    ``permute``. The last may be smaller; one that would have a single value per channel joins the one before it. A sub-batch
    as large as the batch gives batch normalization, one sample gives instance normalization. The state_dict is that of batch
    normalization.

    How a batch updates the running averages:

    ================  =================================================================================================
    ``"mean"``        once, by the mean over sub-batches of means and unbiased variances
    ``"sequential"``  by each sub-batch's mean and unbiased variance in turn, as in the paper: a larger momentum
    ``"moments"``     once, by the batch's raw moments: includes the variance between the sub-batches' means
    ================  =================================================================================================

    ``eps``, ``momentum``, ``affine``, ``track_running_stats``, ``bias`` and ``layout``, the shapes and the errors are those of
    BatchNorm, for sub-batches in place of batches.

    Args:
        ghost_batch_size: samples per sub-batch, from 1. Default: 16.
        memory: how a batch updates the running averages. Default: "mean".
        permute: whether sub-batches are drawn at random. Default: False.

    Reference: Hoffer, Hubara, Soudry (2017), https://arxiv.org/abs/1705.08741, algorithm 1.

    >>> norm = GhostBatchNorm(1, ghost_batch_size=2)
    >>> norm(torch.tensor([[1.0], [3.0], [10.0], [30.0]])).detach().T
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """

    shown = (
        "{0.num_features}, ghost_batch_size={0.ghost_batch_size}, eps={0.eps}, momentum={0.momentum}, affine={0.affine}, "
        "track_running_stats={0.track_running_stats}, memory={0.memory!r}"
    )
    unusual: ClassVar = {"permute": False, "layout": "n c *"}
    in_training = "its sub-batches; leave the layer out, or replace it by BatchNorm first"

    def __init__(
        self,
        num_features: int,
        ghost_batch_size: int = 16,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        memory: Memory = "mean",
        permute: bool = False,
        bias: bool = True,
        layout: str = "n c *",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        _check_size("GhostBatchNorm", ghost_batch_size)
        self.memory: Memory = memory
        self.ghost_batch_size, self.permute, self.layout = ghost_batch_size, permute, layout
        self.complete(bias)

    def make_rule(self) -> Rule:
        eps = self.__dict__["eps"]
        rule = ghost_batch_norm_rule(self.ghost_batch_size, eps, self.momentum, self.layout, self.memory)
        self._whole = _whole(rule, self.layout)
        return rule

    def check(self, input: Tensor) -> None:
        check_channels("GhostBatchNorm", input, self.num_features, "num_features", self.layout)
        if self.training or self.running_mean is None:
            check_several("GhostBatchNorm", input[: self.ghost_batch_size], self._whole.support)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check(input)
        memory, running = self.rule.memory, self.running()
        if running is not None and not self.training:
            how = {"running": running, "training": False, "mask": mask, "backend": self.backend}
            return run(self._whole, input, self.weight, self.bias, **how)
        order = torch.randperm(input.shape[0], device=input.device) if self.permute else None
        x = input if order is None else input[order]
        if mask is not None and order is not None:
            mask = mask.expand(input.shape)[order]
        y, ghosts = run_in_sub_batches(
            self.rule, self._whole, self.ghost_batch_size, x, self.weight, self.bias, mask=mask, backend=self.backend
        )
        if running is not None and memory is not None and self.track_running_stats:
            _remember(memory, running, ghosts, self.memory)
        return y if order is None else y[torch.argsort(order)]

    def explain(self, input: Tensor) -> Explanation:
        """Say which back end would normalize this input, and why; of a batch that does not divide, for its full sub-batches."""
        self.check(input)
        rule, size, affine = self.rule, self.ghost_batch_size, (self.weight, self.bias)
        if not self.training and self.running() is not None:
            return explain(self._whole, input, *affine, backend=self.backend)
        return explain_in_sub_batches(rule, self._whole, size, input, *affine, self.backend)


def ghost_batch_norm(
    input: Tensor,
    ghost_batch_size: int = 16,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    memory: Memory = "mean",
    layout: str = "n c *",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Ghost batch normalization in training as a function; running statistics that are given are updated. See GhostBatchNorm.

    >>> ghost_batch_norm(torch.tensor([[1.0], [3.0], [10.0], [30.0]]), 2).T
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
    running = given_statistics("ghost_batch_norm", running_mean, running_var)
    _check_size("ghost_batch_norm", ghost_batch_size)
    rule = ghost_batch_norm_rule(ghost_batch_size, eps, momentum, layout, memory)
    whole = _whole(rule, layout)
    check_several("ghost_batch_norm", input[:ghost_batch_size], whole.support)
    y, ghosts = run_in_sub_batches(rule, whole, ghost_batch_size, input, weight, bias, mask=mask, backend=backend)
    if running is not None and rule.memory is not None:
        _remember(rule.memory, running, ghosts, memory)
    return y


def _remember(memory: Running, running: RunningStatistics, ghosts: Moments, how: Memory) -> None:
    """Update running statistics in place by the moments of sub-batches, one row each."""
    n = ghosts.n
    assert isinstance(n, Tensor)
    if how == "sequential":
        for mean, var in zip(ghosts.mean, ghosts.unbiased(), strict=True):
            memory.blend(running, mean, var)
        return
    # Sub-batches that a mask leaves without a variance do not count.
    share = (n > 1).to(ghosts.mean.dtype) if how == "mean" else n
    total = share.sum(0)
    share = share / total
    spoken = share > 0
    mean = torch.where(spoken, share * ghosts.mean, 0.0).sum(0)
    var = ghosts.unbiased() if how == "mean" else ghosts.var + (ghosts.mean - mean).square()
    var = torch.where(spoken, share * var, 0.0).sum(0)
    # Where none counts, NaN leaves the running statistics unchanged.
    memory.blend(running, mean, torch.where(total > 0, var, math.nan))


def _whole(rule: Rule, layout: str) -> Rule:
    return Rule(Support(layout, over="n *"), rule.statistic, rule.compensation, rule.memory)


def _check_size(who: str, size: int) -> None:
    if not isinstance(whole(size), int) or size < 1:
        raise OptionError(f"{who}: ghost_batch_size={size!r}; wanted a whole number from 1")


CARD = Card(
    title="Ghost batch normalization",
    word="ghost",
    normalized_over="each sub-batch and channel, over the sub-batch's samples and all positions",
    paper=paper("hoffer2017train"),
    use_cases="training with batches of hundreds and more on one device",
    strengths="keeps the regularizing noise of small batches in large ones; loads checkpoints of batch normalization",
    weaknesses="the size of the sub-batch is one more choice; training and inference compute different functions",
    module=GhostBatchNorm,
    functional=ghost_batch_norm,
    make=lambda channels: GhostBatchNorm(channels, ghost_batch_size=2),
    build=lambda at: GhostBatchNorm(
        at.channels, int(at.option), at.eps, at.momentum, at.affine, bias=at.bias, layout=at.axes, **at.factory
    ),
    option=whole_number("SIZE", 16, of=lambda norm: norm.ghost_batch_size),
    axes=("n c *", "n * c"),
    rule=ghost_batch_norm_rule(2),
    order_dependent=True,
    running_state=True,
    foldable=True,
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift"}),
)
