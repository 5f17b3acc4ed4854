"""Batch normalization: normalize each channel over the batch and all positions; or subtract its mean alone."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError
from normkit.core.memory import RunningMean, RunningStatistics, recomputed
from normkit.core.module import TorchBatchNorm
from normkit.core.moments import Moments
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, show
from normkit.engine.call import Call, Output, Save
from normkit.engine.dispatch import Activation, Backend, run
from normkit.engine.layer import Layer, channels_rule, check_channels, check_layout, check_several, given_statistics

_NONE: tuple[int, Moments | None] = 0, None  # passes since the last update, and their moments


batch_norm_rule = partial(channels_rule, "BatchNorm", "n *")


class BatchNorm(Layer, TorchBatchNorm):
    """Normalize each channel over the batch and all positions, for inputs of any rank.

    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias, with E and Var (population) over batch and positions in training, and
    running averages of them in evaluation: running <- (1 - momentum) running + momentum * statistic, with the unbiased
    variance. A bias of the previous layer cancels. In training |y| <= sqrt(elements - 1) before compensation.

    A ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in one: same arguments, defaults and state_dict. A batch whose statistics are
    not finite leaves the running statistics unchanged, and so does what activation checkpointing computes again.

    Under gradient accumulation each micro-batch is normalized by its own statistics. ``accumulate=k`` merges those of k of them,
    and updates the running statistics once, by the mean and the variance of all their elements, as one large batch would.

    Args:
        num_features: channels C.
        eps: added to the variance. Default: 1e-5.
        momentum: weight of the new value in the running averages; None for the cumulative average. Default: 0.1.
        affine: whether there are a weight (starts at 1) and a bias (at 0). Default: True.
        track_running_stats: whether there are running averages; without, the batch's statistics are always used. Default: True.
        bias: False omits the bias. Default: True.
        layout: ``"n c *"`` for channels first, ``"n * c"`` for channels last. Default: ``"n c *"``.
        activation: fused activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or None.
            torch's tools that replace a batch norm (``convert_sync_batchnorm``, ``fuse_conv_bn_eval``) are then refused, as they
            would lose the activation. Default: None.
        save: what is kept for the backward pass: ``"input"``, or the ``"output"``, which a convolution or linear layer behind it
            keeps anyway: the normalized input is then computed again from it, and nothing may change the output in place. Where
            no kernel does so the input is kept, as ``explain`` says. Default: "input".
        spatial: axes of positions: 1, 2 or 3 refuses inputs of another rank, as torch's BatchNorm1d (which takes (N, C) too), 2d
            and 3d do; None takes any. Default: None.
        accumulate: training passes whose batches count as one in the running statistics. Default: 1.

    Shape: (N, C, *) or, with channels last, (N, *, C); the output has the same shape. N may be 0.

    Raises:
        ShapeError: a number of channels other than ``num_features``, a rank that ``spatial`` excludes, or one value per
            channel in training.
        OptionError: an unknown layout, or ``accumulate`` below 1.
        SurgeryError: one of torch's tools would replace the layer and lose its activation or layout.
        OptionError: with ``save="output"``, an activation that has no inverse or, in training, a gain too small to be undone.

    Reference: Ioffe and Szegedy, "Batch Normalization" (2015), https://arxiv.org/abs/1502.03167.

    >>> norm = BatchNorm(1, momentum=0.5)
    >>> norm(torch.tensor([[1.0], [3.0]])).detach().T
    tensor([[-1.0000,  1.0000]])
    >>> norm.running_mean, norm.running_var
    (tensor([1.]), tensor([1.5000]))
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        layout: str = "n c *",
        activation: Activation | None = None,
        save: Save = "input",
        spatial: int | None = None,
        accumulate: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if accumulate < 1:
            raise OptionError(f"BatchNorm: accumulate={accumulate}; wanted a whole number of passes, from 1")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation, self.spatial, self.layout, self.accumulate = activation, spatial, layout, accumulate
        self.save = save
        self._waiting = _NONE
        self.complete(bias)

    def make_rule(self) -> Rule:
        return batch_norm_rule(self.__dict__["eps"], self.momentum, self.layout)

    def check(self, input: Tensor) -> None:
        if self.spatial is not None and input.dim() != self.spatial + 2 and (input.dim(), self.spatial) != (2, 1):
            wanted = "2D or 3D" if self.spatial == 1 else f"{self.spatial + 2}D"
            raise ShapeError(f"BatchNorm: expected {wanted} input (got {input.dim()}D input, {show(input.shape)})")
        check_channels("BatchNorm", input, self.num_features, "num_features", self.layout)
        if self.training or self.running_mean is None:
            check_several("BatchNorm", input, self.rule.support)

    def reset_running_stats(self) -> None:
        """Forget the running statistics, and the passes that wait to enter them."""
        self.__dict__["_waiting"] = _NONE
        super().reset_running_stats()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_waiting"] = _NONE  # they would enter the statistics that are loaded
        super()._load_from_state_dict(*args, **kwargs)

    def lost(self, converting: bool) -> str:
        waits = f"accumulate={self.accumulate}; set it to 1 first" if converting and self.accumulate > 1 else ""
        return super().lost(converting) or waits

    def _perform(self, call: Call) -> Output:
        if self.accumulate == 1 and self._waiting is not _NONE:
            self.__dict__["_waiting"] = _NONE
        if self.accumulate == 1 or not call.own or call.running is None:
            return super()._perform(call)
        output = super()._perform(call._replace(running=None, measured=True))
        if not recomputed():
            self._gather(output.moments, call.running, call.rule)
        return output

    def _gather(self, found: Moments | None, running: RunningStatistics, rule: Rule) -> None:
        """Merge the moments of one pass; after the last of ``accumulate`` passes, update the running statistics by all."""
        assert found is not None
        assert rule.memory is not None
        passes, before = self._waiting
        found = Moments(found.mean.detach(), found.var.detach(), found.n)
        if before is not None:  # the layer may have been moved since
            mean, var, n = before
            to = found.mean.device
            before = Moments(mean.to(to), var.to(to), n.to(to) if isinstance(n, Tensor) else n)
        merged = found if before is None else before.merge(found)
        if passes + 1 < self.accumulate:
            self.__dict__["_waiting"] = passes + 1, merged
            return
        self.__dict__["_waiting"] = _NONE
        empty = torch.as_tensor(merged.n, device=merged.mean.device) == 0  # without elements nothing changes
        mean = torch.where(empty, math.nan, merged.mean)
        rule.memory.blend(running, mean.reshape(-1), merged.unbiased().reshape(-1))

    def extra_repr(self) -> str:
        return super().extra_repr() + self.repr_options(
            layout="n c *", spatial=None, activation=None, save="input", accumulate=1
        )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str = "n c *",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Batch normalization as a function, with the arguments of ``torch.nn.functional.batch_norm``; see BatchNorm.

    >>> batch_norm(torch.tensor([[1.0], [3.0]]), training=True).T
    tensor([[-1.0000,  1.0000]])
    """
    running = given_statistics("batch_norm", running_mean, running_var, None if training else "training=False")
    rule = batch_norm_rule(eps, momentum, layout, running_mean is not None)
    if input.shape == (0,):  # torch accepts it: there are no samples, and so no channels
        return input.clone()
    if training:
        check_several("batch_norm", input, rule.support)
    return run(rule, input, weight, bias, running=running, training=training, mask=mask, backend=backend)


CARD = Card(
    title="Batch normalization",
    word="bn",
    normalized_over="each channel, over the batch and all positions",
    paper=paper("ioffe2015batch"),
    use_cases="convolutional networks and MLPs trained with batches of 16 and more",
    strengths="fast and stable training at large learning rates; its noise regularizes; free at inference once folded",
    weaknesses="depends on the batch: weak for small or correlated batches; training and inference compute different functions",
    module=BatchNorm,
    functional=batch_norm,
    build=lambda at: BatchNorm(
        at.channels, at.eps, at.momentum, at.affine, bias=at.bias, layout=at.axes, spatial=at.spatial, **at.factory
    ),
    axes=("n c *", "n * c"),
    rule=batch_norm_rule(),
    running_state=True,
    foldable=True,
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift"}),
)


@remembered
def mean_only_batch_norm_rule(momentum: float | None = 0.1, layout: str = "n c *", memory: bool = True) -> Rule:
    """Mean-only batch normalization as data."""
    support = Support(check_layout("MeanOnlyBatchNorm", layout), over="n *")
    return Rule(support, Statistic("mean", None), Affine("c"), RunningMean(momentum) if memory else None)


class MeanOnlyBatchNorm(Layer):
    """Subtract each channel's mean over the batch and all positions; the companion of weight normalization.

    y = x - E[x] + bias, with E over batch and positions in training, and a running average of it in evaluation:
    running <- (1 - momentum) running + momentum * E[x]. Nothing is divided and there is no gain: weight normalization before
    it sets the scale. The gradient subtracts its own mean, dx = dy - E[dy]. A bias of the previous layer cancels. The batch adds
    only the noise of a mean, which is milder than that of batch normalization.

    ``momentum``, ``bias``, ``track_running_stats`` and ``layout``, the shapes and the errors of shapes are those of BatchNorm.

    Reference: Salimans and Kingma, "Weight Normalization" (2016), https://arxiv.org/abs/1602.07868, section 4.

    >>> norm = MeanOnlyBatchNorm(1, momentum=0.5)
    >>> norm(torch.tensor([[1.0], [5.0]])).detach().T
    tensor([[-2.,  2.]])
    >>> norm.running_mean
    tensor([1.5000])
    """

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        track_running_stats: bool = True,
        *,
        layout: str = "n c *",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features, self.momentum, self.layout = num_features, momentum, layout
        self.track_running_stats = track_running_stats
        self.register_affine((num_features,), False, bias, device=device, dtype=dtype)
        self.register_running((num_features,), "running_mean", tracked=track_running_stats, device=device, dtype=dtype)
        self.complete()

    def make_rule(self) -> Rule:
        return mean_only_batch_norm_rule(self.momentum, self.layout, self.track_running_stats)

    def check(self, input: Tensor) -> None:
        check_channels("MeanOnlyBatchNorm", input, self.num_features, "num_features", self.layout)

    def running(self) -> RunningStatistics | None:
        mean = self.running_mean
        return None if mean is None else RunningStatistics(mean, mean.new_empty(0), self.num_batches_tracked)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"
        text += f", track_running_stats={self.track_running_stats}"
        return text + self.repr_options(layout="n c *")


def mean_only_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    *,
    layout: str = "n c *",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mean-only batch normalization as a function; in training it updates a running mean that is given. See MeanOnlyBatchNorm.

    >>> mean_only_batch_norm(torch.tensor([[1.0], [5.0]]), training=True).T
    tensor([[-2.,  2.]])
    """
    if running_mean is None and not training:
        raise OptionError("mean_only_batch_norm: training=False needs running_mean; give it, or training=True")
    rule = mean_only_batch_norm_rule(momentum, layout, running_mean is not None)
    running = None if running_mean is None else RunningStatistics(running_mean, running_mean.new_empty(0))
    return run(rule, input, None, bias, running=running, training=training, mask=mask, backend=backend)


CARD_MEAN_ONLY_BATCH = Card(
    title="Mean-only batch normalization",
    word="mean_only",
    normalized_over="each channel, over the batch and all positions; only its mean",
    formula="y = x - E[x] + bias",
    paper=paper("salimans2016weight"),
    use_cases="after weight-normalized layers, whose lengths set the scale",
    strengths="less noise than batch normalization; free at inference once folded",
    weaknesses="depends on the batch; leaves the scale of activations to the weights",
    module=MeanOnlyBatchNorm,
    functional=mean_only_batch_norm,
    build=lambda at: MeanOnlyBatchNorm(at.channels, at.momentum, at.affine and at.bias, layout=at.axes, **at.factory),
    axes=("n c *", "n * c"),
    takes=("bias",),
    rule=mean_only_batch_norm_rule(),
    running_state=True,
    foldable=True,
    invariances=frozenset({"data shift"}),
)
