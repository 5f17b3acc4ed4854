"""Mean-only batch normalization: subtract each channel's mean over the batch and all positions."""

from typing import Any

from torch import Tensor

from normkit.core.card import Card, Paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError
from normkit.core.memory import RunningMean, RunningStatistics
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Layer, check_channels, check_layout


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

    Args:
        num_features: channels C.
        momentum: weight of the new value in the running mean; None for the cumulative average. Default: 0.1.
        bias: whether there is a bias (starts at 0). Default: True.
        track_running_stats: whether there is a running mean; without, the batch's mean is always used. Default: True.
        layout: ``"n c *"`` for channels first, ``"n * c"`` for channels last. Default: ``"n c *"``.

    Shape:
        (N, C, *) or, with channels last, (N, *, C); the output has the same shape. N may be 0.

    Raises:
        ShapeError: a number of channels other than ``num_features``.
        OptionError: an unknown layout.

    Reference:
        Salimans and Kingma, "Weight Normalization" (2016), https://arxiv.org/abs/1602.07868, section 4.

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


CARD = Card(
    title="Mean-only batch normalization",
    word="mean_only",
    normalized_over="each channel, over the batch and all positions; only its mean",
    formula="y = x - E[x] + bias",
    paper=Paper(
        "Salimans, Tim and Kingma, Diederik P.",
        "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
        2016,
        "https://arxiv.org/abs/1602.07868",
    ),
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
