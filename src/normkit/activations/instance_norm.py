"""Instance normalization: normalize each channel of each sample over all positions."""

from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.errors import ShapeError
from normkit.core.memory import RunningStatistics
from normkit.core.rule import Rule
from normkit.core.support import show
from normkit.engine.call import Save
from normkit.engine.dispatch import Activation, Backend, Explanation, run
from normkit.engine.layer import Layer, channels_rule, check_channels, check_several, given_statistics

instance_norm_rule = partial(channels_rule, "InstanceNorm", "*")


class InstanceNorm(Layer, nn.modules.instancenorm._InstanceNorm):
    """Normalize each channel of each sample over its positions, which removes its contrast and brightness.

    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias. Without running statistics, training and evaluation compute the
    same. With them, evaluation uses running averages of the samples' means and unbiased variances, averaged over the batch.

    A ``torch.nn.InstanceNorm1d``, ``2d`` and ``3d`` in one: same arguments, defaults and state_dict. As one class serves every
    rank, the input must have a batch axis, unless ``spatial`` gives the rank. ``momentum=None`` gives the cumulative
    average, as in BatchNorm.

    Args:
        num_features: channels C.
        eps: added to the variance. Default: 1e-5.
        momentum: weight of the new value in the running averages; None for the cumulative average. Default: 0.1.
        affine: whether there are a weight (starts at 1) and a bias (at 0). Default: False.
        track_running_stats: whether there are running averages. Default: False.
        bias: False omits the bias. Default: True.
        layout: ``"n c *"`` for channels first, ``"n * c"`` for channels last. Default: ``"n c *"``.
        activation: fused activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or None.
            Default: None.
        save: what is kept for the backward pass: ``"input"``, or the ``"output"``, which a convolution or linear layer behind it
            keeps anyway: the normalized input is then computed again from it. Default: "input".
        spatial: axes of positions: 1, 2 or 3 accepts inputs without a batch axis too, and refuses any other rank, as torch's
            InstanceNorm1d, 2d and 3d do; None accepts any rank, with a batch axis. Default: None.

    Shape:
        (N, C, *) or, with channels last, (N, *, C); the output has the same shape; with ``spatial`` also without N.

    Raises:
        ShapeError: a number of channels other than ``num_features``, a rank that ``spatial`` excludes, or a single position.
        OptionError: an unknown layout.
        OptionError: with ``save="output"``, an activation that has no inverse or, in training, a gain too small to be undone.

    Reference:
        Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization" (2016),
        https://arxiv.org/abs/1607.08022.

    >>> InstanceNorm(2)(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]))
    tensor([[[-1.0000,  1.0000],
             [-1.0000,  1.0000]]])
    """

    unusual: ClassVar = {"layout": "n c *", "spatial": None, "activation": None, "save": "input"}

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        layout: str = "n c *",
        activation: Activation | None = None,
        save: Save = "input",
        spatial: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)  # pyright: ignore[reportArgumentType]
        self.activation, self.spatial, self.layout, self.save = activation, spatial, layout, save
        self.complete(bias)

    def make_rule(self) -> Rule:
        return instance_norm_rule(self.eps, self.momentum, self.layout)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self._is_one_sample(input):
            return super().forward(input, mask)
        return super().forward(input.unsqueeze(0), mask).squeeze(0)  # a mask broadcasts over it unchanged

    def after_sum(self, input: Tensor, residual: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._is_one_sample(input):
            return super().after_sum(input, residual, mask)
        y, total = super().after_sum(input.unsqueeze(0), residual.unsqueeze(0), mask)
        return y.squeeze(0), total.squeeze(0)

    def explain(self, input: Tensor) -> Explanation:
        return super().explain(input.unsqueeze(0) if self._is_one_sample(input) else input)

    def _is_one_sample(self, input: Tensor) -> bool:
        return self.spatial is not None and input.dim() == self.spatial + 1

    def check(self, input: Tensor) -> None:
        if self.spatial is not None and input.dim() != self.spatial + 2:
            wanted = f"{self.spatial + 1}D or {self.spatial + 2}D"
            raise ShapeError(f"InstanceNorm: expected {wanted} input (got {input.dim()}D input, {show(input.shape)})")
        check_channels("InstanceNorm", input, self.num_features, "num_features", self.layout)
        if self.training or self.running() is None:
            check_several("InstanceNorm", input, self.rule.support)

    def running(self) -> RunningStatistics | None:
        if not self.track_running_stats:  # also if it was set later: torch then uses the input's own
            return None
        running = super().running()
        # torch counts no batches here; only the cumulative average, which is ours, needs the count.
        return running if running is None or self.momentum is None else running._replace(batches=None)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str = "n c *",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Instance normalization as a function, with the arguments of ``torch.nn.functional.instance_norm``; see InstanceNorm.

    >>> instance_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]))
    tensor([[[-1.0000,  1.0000],
             [-1.0000,  1.0000]]])
    """
    needed = None if use_input_stats else "use_input_stats=False"
    running = given_statistics("instance_norm", running_mean, running_var, needed)
    rule = instance_norm_rule(eps, momentum, layout, running_mean is not None)
    if use_input_stats:
        check_several("instance_norm", input, rule.support)
    return run(rule, input, weight, bias, running=running, training=use_input_stats, mask=mask, backend=backend)


CARD = Card(
    title="Instance normalization",
    word="in",
    normalized_over="each sample and channel, over all positions",
    paper=Paper(
        "Ulyanov, Dmitry and Vedaldi, Andrea and Lempitsky, Victor",
        "Instance Normalization: The Missing Ingredient for Fast Stylization",
        2016,
        "https://arxiv.org/abs/1607.08022",
    ),
    use_cases="style transfer, image generation, domain-robust vision",
    strengths="removes contrast and brightness of each image; independent of the batch",
    weaknesses="removes contrast even where it is the cue; undefined for a single position",
    module=InstanceNorm,
    functional=instance_norm,
    build=lambda at: InstanceNorm(
        at.channels,
        at.eps,
        at.momentum,
        at.affine,
        bias=at.bias,
        layout=at.axes,
        # The rank of another kind of norm is not copied: its (N, C) would be read as one sample.
        spatial=at.spatial if at.kind == "instance_norm" else None,
        **at.factory,
    ),
    axes=("n c *", "n * c"),
    rule=instance_norm_rule(),
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift", "sample scale"}),
)
