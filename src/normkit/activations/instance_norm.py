"""Instance normalization, and its adaptive form, which takes the statistics of each channel from another image."""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError
from normkit.core.memory import RunningStatistics
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype, moments
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, show
from normkit.engine.call import Call, Output, Save
from normkit.engine.dispatch import Activation, Backend, Explanation, run
from normkit.engine.layer import Layer, channels_rule, check_channels, check_several, given_statistics

instance_norm_rule = partial(channels_rule, "InstanceNorm", "*")

_ADAPTIVE_RULE = Rule(Support("n c *", over="*"), Statistic("mean", "std", 1e-5), Affine("n c"))


class InstanceNorm(Layer, nn.modules.instancenorm._InstanceNorm):
    """Normalize each channel of each sample over its positions, which removes its contrast and brightness.

    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias. Without running statistics, training and evaluation compute the
    same. With them, evaluation uses running averages of the samples' means and unbiased variances, averaged over the batch.

    A ``torch.nn.InstanceNorm1d``, ``2d`` and ``3d`` in one: same arguments, defaults and state_dict. As one class serves every
    rank, the input must have a batch axis, unless ``spatial`` gives the rank. ``momentum=None`` gives the cumulative
    average, as in BatchNorm.

    ``eps``, ``momentum``, ``bias``, ``layout``, ``activation`` and ``save`` and the errors are those of BatchNorm.

    Args:
        affine: whether there are a weight (starts at 1) and a bias (at 0). Default: False.
        track_running_stats: whether there are running averages. Default: False.
        spatial: axes of positions: 1, 2 or 3 accepts inputs without a batch axis too, and refuses any other rank, as torch's
            InstanceNorm1d, 2d and 3d do; None accepts any rank, with a batch axis. Default: None.

    Shape: (N, C, *) or, with channels last, (N, *, C); the output has the same shape; with ``spatial`` also without N.

    Raises:
        ShapeError: as in BatchNorm; or only one position.

    Reference: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization" (2016), https://arxiv.org/abs/1607.08022.

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

    def _perform(self, call: Call) -> Output:
        if not self._is_one_sample(call.x):
            return super()._perform(call)
        residual = None if call.residual is None else call.residual.unsqueeze(0)
        found = super()._perform(call._replace(x=call.x.unsqueeze(0), residual=residual))  # a mask broadcasts as it is
        return found._replace(y=found.y.squeeze(0), total=None if found.total is None else found.total.squeeze(0))

    def _quantize(self, input: Tensor) -> tuple[Tensor, Tensor]:
        if not self._is_one_sample(input):
            return super()._quantize(input)
        q, scale = super()._quantize(input.unsqueeze(0))
        return q.squeeze(0), scale.squeeze(0)

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
    paper=paper("ulyanov2016instance"),
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


@remembered
def adaptive_instance_norm_rule(eps: float = 1e-5) -> Rule:
    """Adaptive instance normalization as data; weight and bias are a style's deviation and mean, per sample and channel."""
    return _ADAPTIVE_RULE if eps == 1e-5 else replace(_ADAPTIVE_RULE, statistic=Statistic("mean", "std", eps))


class AdaptiveInstanceNorm(Module):
    """Give each channel of a content the mean and deviation that the same channel has in a style.

    y = sd(s) * (x - E[x]) / sqrt(Var[x] + eps) + E[s], with E and Var of each sample and channel over the positions and
    sd(s) = sqrt(Var[s] + eps); the result is (1 - strength) * x + strength * y. Nothing is learned, and a content with itself
    as style is unchanged.

    Args:
        strength: the share of the style: 0 leaves the content unchanged, 1 replaces its statistics. Default: 1.
        eps: added to the variances. Default: 1e-5.

    Shape: content (N, C, *) and style (N or 1, C, *), of any spatial sizes, to the shape of the content.

    Raises:
        ShapeError: content and style do not fit, or the content has a single position.

    Reference: Huang and Belongie (2017), https://arxiv.org/abs/1703.06868.

    >>> AdaptiveInstanceNorm()(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[10.0, 20.0, 30.0, 40.0]]]))
    tensor([[[13.8197, 36.1803]]])
    """

    shown = "strength={0.strength}, eps={0.eps}"

    def __init__(self, strength: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.strength, self.eps = strength, eps

    def forward(
        self, input: Tensor, style: Tensor, mask: Tensor | None = None, style_mask: Tensor | None = None
    ) -> Tensor:
        return adaptive_instance_norm(input, style, self.strength, self.eps, mask=mask, style_mask=style_mask)


def adaptive_instance_norm(
    input: Tensor,
    style: Tensor,
    strength: float | Tensor = 1.0,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    style_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Adaptive instance normalization as a function; see AdaptiveInstanceNorm.

    ``strength`` may be a tensor of one value, or one per sample: (N,) or (N, 1, ...). Elements where a mask (boolean,
    broadcasts over its image) is False enter no statistic, and become zero in the content.

    >>> adaptive_instance_norm(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[10.0, 30.0]]]), strength=0.5)
    tensor([[[ 5.5000, 16.5000]]])
    """
    rule = adaptive_instance_norm_rule(eps)
    accumulation_dtype(input.dtype)  # refuses integers by name
    if (
        input.dim() < 2
        or style.dim() < 2
        or style.shape[1] != input.shape[1]
        or style.shape[0] not in (1, input.shape[0])
    ):
        raise ShapeError(
            f"adaptive_instance_norm: a style of {show(style.shape)} for a content of {show(input.shape)}; wanted n c * with the "
            "content's channels, and its samples or one"
        )
    check_several("adaptive_instance_norm", input, rule.support)
    found = moments(style, tuple(range(2, style.dim())), style_mask)
    shape = input.shape[:2]
    deviation = (found.var + eps).sqrt().reshape(style.shape[:2]).expand(shape)
    y = run(rule, input, deviation, found.mean.reshape(style.shape[:2]).expand(shape), mask=mask, backend=backend)
    if isinstance(strength, Tensor):
        if strength.numel() not in (1, len(input)) or strength.shape[1:].numel() != 1:
            raise OptionError(
                f"adaptive_instance_norm: strength of shape {show(strength.shape)}; wanted one, or {input.shape[0]}"
            )
        strength = strength.to(input.dtype).reshape([-1] + [1] * (input.dim() - 1))
    elif strength == 1:
        return y
    return torch.lerp(input if mask is None else torch.where(mask, input, 0.0), y, strength)


CARD_ADAPTIVE_INSTANCE = Card(
    title="Adaptive instance normalization",
    wordless="it takes a style as well as its input",
    normalized_over="each sample and channel, over all positions; scaled and shifted to the statistics of a style",
    formula="y = sd[s] * (x - E[x]) / sqrt(Var[x] + eps) + E[s]",
    paper=paper("huang2017arbitrary"),
    use_cases="style transfer; the generator of StyleGAN",
    strengths="any style in one pass, at any strength; nothing to learn",
    weaknesses="only the mean and contrast of channels are exchanged, not how channels vary together",
    module=AdaptiveInstanceNorm,
    functional=adaptive_instance_norm,
    make=lambda channels: AdaptiveInstanceNorm(),
    rule=adaptive_instance_norm_rule(),
    extra=lambda x: (torch.ones_like(x).cumsum(-1).cumsum(1),),  # a slope that grows with the channel, whatever x is
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift", "sample scale"}),
)
