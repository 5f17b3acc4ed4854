"""Conditional normalization: weight and bias looked up by class, or computed from a vector or a map."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine, modulation, per_sample
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.memory import Running, RunningStatistics
from normkit.core.moments import accumulation_dtype, full_precision
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, check_shape, show
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Layer, check_channels, check_several

_SUPPORTS = {over: Support("n c *", over=over) for over in ("*", "n *")}


@remembered
def conditional_norm_rule(over: str = "*", eps: float = 1e-5, momentum: float | None = 0.1, per: str = "n c") -> Rule:
    """Conditional normalization as data: over ``"*"`` instance, over ``"n *"`` batch normalization, with an affine per sample."""
    check_options("conditional norm", over=(over, tuple(_SUPPORTS)))
    memory = Running(momentum) if over == "n *" else None
    return Rule(_SUPPORTS[over], Statistic("mean", "std", eps), Affine(per), memory)


class _Normalizer(Layer):
    """The base of both layers: the rule, and the running averages of batch normalization."""

    per = "n c"

    def __init__(
        self, num_features: int, over: str, eps: float, momentum: float | None, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.num_features, self.over, self.eps, self.momentum = num_features, over, eps, momentum
        self.complete()
        names, factory = ("running_mean", "running_var"), {"device": device, "dtype": dtype}
        self.register_running((num_features,), *names, tracked=over == "n *", **factory)

    def make_rule(self) -> Rule:
        return conditional_norm_rule(self.over, self.eps, self.momentum, self.per)

    def compensated(self, input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        running = self.running()
        own = running is None or self.training
        if own:
            check_several(type(self).__name__, input, self.rule.support)
        return run(self.rule, input, weight, bias, running=running, training=own, mask=mask, backend=self.backend)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, over={self.over!r}, eps={self.eps}"
        return text + (f", momentum={self.momentum}" if self.over == "n *" else "")


class ConditionalNorm(_Normalizer):
    """Instance or batch normalization whose weight and bias depend on a class or on a vector.

    y = weight(k) * (x - E[x]) / sqrt(Var[x] + eps) + bias(k). With ``classes`` each class k has its own weight and bias;
    a condition of one number per class mixes them, as between styles. With ``features`` the condition is a vector v, and
    weight = 1 + v W, bias = v B. Both start as the unconditioned norm.

    Args:
        num_features: channels C.
        classes: number of classes.
        features: or length of the vectors.
        over: ``"*"`` for instance, ``"n *"`` for batch normalization. Default: ``"*"``.
        eps: added to the variance. Default: 1e-5.
        momentum: weight of the new value in batch normalization's running averages; None for cumulative. Default: 0.1.

    Shape: input (N, C, *); condition (N,) of integers, (N, classes) or (N, features); the output has the input's shape.

    Raises:
        ShapeError: another number of channels, a condition of another shape, or one value per statistic.
        OptionError: not exactly one of ``classes`` and ``features``; an unknown ``over``.

    Reference: Dumoulin, Shlens, Kudlur, "A Learned Representation for Artistic Style" (2017),
    https://arxiv.org/abs/1610.07629; de Vries, Strub, Mary, Larochelle, Pietquin, Courville, "Modulating Early Visual
    Processing by Language" (2017), https://arxiv.org/abs/1707.00683.

    >>> norm = ConditionalNorm(1, classes=2)
    >>> _ = norm.weight.data[1].fill_(5.0)
    >>> norm(torch.tensor([[[1.0, 3.0]], [[1.0, 3.0]]]), torch.tensor([0, 1])).detach().view(2, 2)
    tensor([[-1.0000,  1.0000],
            [-5.0000,  5.0000]])
    """

    def __init__(
        self,
        num_features: int,
        classes: int | None = None,
        features: int | None = None,
        *,
        over: str = "*",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, over, eps, momentum, device, dtype)
        if (classes is None) == (features is None):
            raise OptionError(f"ConditionalNorm: classes={classes}, features={features}; give one of them")
        self.classes, self.features = classes, features
        rows = classes if classes is not None else features
        assert rows is not None
        self.register_affine((rows, num_features), device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it the unconditioned norm, and forget the running statistics."""
        super().reset_parameters()
        self.fill(weight=1 if self.features is None else 0)

    def forward(self, input: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_channels("ConditionalNorm", input, self.num_features, "num_features", "n c *")
        assert self.weight is not None
        assert self.bias is not None
        rows = (self.classes or 0) + (self.features or 0)  # one of them is None
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            check_shape("ConditionalNorm", name, parameter, rows, self.num_features)
        weight, bias = (self._pick(parameter, condition, input) for parameter in (self.weight, self.bias))
        return self.compensated(input, weight if self.features is None else weight + 1, bias, mask)

    def _pick(self, parameter: Tensor, condition: Tensor, input: Tensor) -> Tensor:
        wide = accumulation_dtype(input.dtype)
        samples, shape = input.shape[0], condition.shape
        if self.classes is not None and shape in ((), (1,), (samples,)) and not condition.is_floating_point():
            return F.embedding(condition, parameter).to(wide).expand(samples, -1)
        condition = per_sample(condition) if condition.is_floating_point() else condition
        if condition.shape[1:] != parameter.shape[:1] or condition.shape[0] not in (1, samples):
            wanted = "one class, or one share per class," if self.classes is not None else f"{self.features} features"
            raise ShapeError(
                f"ConditionalNorm: got a condition of {show(shape)} ({condition.dtype}) for an input of "
                f"{show(input.shape)}, wanted {wanted} for each sample"
            )
        with full_precision(input):
            return (condition.to(wide) @ parameter.to(wide)).expand(samples, -1)

    def extra_repr(self) -> str:
        which = f"classes={self.classes}" if self.classes is not None else f"features={self.features}"
        return f"{super().extra_repr()}, {which}"


class SpatiallyAdaptiveNorm(_Normalizer):
    """Batch or instance normalization whose weight and bias are computed from a map, for each position.

    y = (1 + g(map)) * (x - E[x]) / sqrt(Var[x] + eps) + b(map), where g and b are convolutions of a shared convolution with a
    rectifier. The map, such as one-hot semantic labels, is resized to the input by nearest neighbour; as it modulates after
    the norm, the norm does not wash it out. A sequence is an image of width one.

    ``num_features``, ``over``, ``eps`` and ``momentum`` are as for ConditionalNorm; ``over`` is ``"n *"`` if not said.

    Args:
        map_channels: channels of the map, such as the number of labels.
        hidden: channels of the shared convolution. Default: 128.
        kernel_size: kernel size of the convolutions, odd. Default: 3.

    Shape: input (N, C, L) or (N, C, H, W), map (N, M, *) of as many axes and any size; the output has the input's shape.

    Raises:
        ShapeError: another number of channels, a map that does not fit, or one value per statistic.
        OptionError: an unknown ``over``, or an even kernel size.

    Reference: Park, Liu, Wang, Zhu (2019), https://arxiv.org/abs/1903.07291.

    >>> norm = SpatiallyAdaptiveNorm(1, 2, hidden=4, over="*")
    >>> norm(torch.rand(3, 1, 8, 8), torch.rand(3, 2, 4, 4)).shape
    torch.Size([3, 1, 8, 8])
    """

    per = "n c *"

    def __init__(
        self,
        num_features: int,
        map_channels: int,
        hidden: int = 128,
        kernel_size: int = 3,
        *,
        over: str = "n *",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, over, eps, momentum, device, dtype)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise OptionError(f"SpatiallyAdaptiveNorm: kernel_size={kernel_size}; wanted an odd number")
        options = {"padding": kernel_size // 2, "device": device, "dtype": dtype}
        self.map_channels = map_channels
        self.register_parameter("weight", None)  # the map gives both
        self.register_parameter("bias", None)
        self.shared = nn.Conv2d(map_channels, hidden, kernel_size, **options)
        self.gain = nn.Conv2d(hidden, num_features, kernel_size, **options)
        self.shift = nn.Conv2d(hidden, num_features, kernel_size, **options)

    def forward(self, input: Tensor, map: Tensor, mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_channels("SpatiallyAdaptiveNorm", input, self.num_features, "num_features", "n c *")
        accumulation_dtype(input.dtype)  # refuses integers by name
        wanted = (input.shape[0], self.map_channels)
        if input.dim() not in (3, 4) or map.dim() != input.dim() or tuple(map.shape[:2]) != wanted:
            raise ShapeError(
                f"SpatiallyAdaptiveNorm: got an input of {show(input.shape)} and a map of {show(map.shape)}; wanted "
                f"n c h w or n c l of both, {wanted[0]} samples and {wanted[1]} channels of the map"
            )
        if 0 in (*input.shape[2:], *map.shape[2:]):
            raise ShapeError(
                f"SpatiallyAdaptiveNorm: got an input of {show(input.shape)} and a map of {show(map.shape)}; "
                "wanted at least one position in each"
            )
        map = F.interpolate(map.to(self.shared.weight.dtype), input.shape[2:], mode="nearest")
        hidden = self.shared(map if map.dim() == 4 else map.unsqueeze(-1)).relu()
        gain, shift = (layer(hidden).reshape(input.shape) for layer in (self.gain, self.shift))
        return self.compensated(input, gain.to(accumulation_dtype(gain.dtype)) + 1, shift, mask)


def conditional_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    over: str = "*",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Instance or batch normalization with a weight and bias per sample (N, C), or per position (N, C, *).

    Weight and bias may also be (C,), or have as many axes as the input and broadcast over it, as (N, C, 1, 1).

    >>> x = torch.tensor([[[1.0, 3.0]], [[1.0, 3.0]]])
    >>> conditional_norm(x, torch.tensor([[1.0], [5.0]]), torch.zeros(2, 1)).view(2, 2)
    tensor([[-1.0000,  1.0000],
            [-5.0000,  5.0000]])
    """
    per, (weight, bias) = modulation("n c *", input.shape, weight, bias)
    rule = conditional_norm_rule(over, eps, momentum, per)
    running = None if running_mean is None or running_var is None else RunningStatistics(running_mean, running_var)
    if running is not None and rule.memory is None:
        raise OptionError("conditional_norm: over='*' keeps no running statistics; omit them, or give over='n *'")
    if training or running is None:
        check_several("conditional_norm", input, rule.support)
    return run(rule, input, weight, bias, running=running, training=training, mask=mask, backend=backend)


CARD_INSTANCE = Card(
    name="conditional_instance_norm",
    title="Conditional instance normalization",
    wordless="it takes a condition as well as its input",
    normalized_over="each sample and channel, over all positions; weight and bias by class or vector",
    formula="y = weight(k) * (x - E[x]) / sqrt(Var[x] + eps) + bias(k)",
    paper=paper("dumoulin2017a"),
    use_cases="one style transfer network for many styles and their mixtures",
    strengths="a style is 2 C numbers per layer; independent of the batch",
    weaknesses="a new style must be trained; removes contrast even where it is the cue",
    module=ConditionalNorm,
    functional=conditional_norm,
    make=lambda channels: ConditionalNorm(channels, classes=2),
    rule=conditional_norm_rule("*"),
    extra=lambda x: (torch.ones(x.shape[0], dtype=torch.int64, device=x.device),),
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift", "sample scale"}),
)

CARD_BATCH = Card(
    name="conditional_batch_norm",
    title="Conditional batch normalization",
    wordless="it takes a condition as well as its input",
    normalized_over="each channel, over the batch and all positions; weight and bias by class or vector",
    formula="y = weight(k) * (x - E[x]) / sqrt(Var[x] + eps) + bias(k)",
    paper=paper("devries2017modulating"),
    use_cases="class-conditional image generation (BigGAN, SAGAN); questions about images",
    strengths="a condition reaches every layer at the cost of 2 C numbers",
    weaknesses="depends on the batch, whose classes share their statistics",
    module=ConditionalNorm,
    functional=conditional_norm,
    make=lambda channels: ConditionalNorm(channels, features=2, over="n *"),
    fits=lambda module: module.over == "n *",
    rule=conditional_norm_rule("n *"),
    extra=lambda x: (x.new_ones(x.shape[0], 2),),
    running_state=True,
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift"}),
)

CARD_SPATIAL = Card(
    name="spatially_adaptive_norm",
    title="Spatially adaptive normalization (SPADE)",
    wordless="it takes a map as well as its input",
    normalized_over="each channel, over the batch and all positions; weight and bias of each position by a map",
    formula="y = (1 + g(map)) * (x - E[x]) / sqrt(Var[x] + eps) + b(map)",
    paper=paper("park2019semantic"),
    use_cases="images from label maps and sketches",
    strengths="normalizing does not wash out the map",
    weaknesses="three convolutions per layer; depends on the batch in its original form",
    module=SpatiallyAdaptiveNorm,
    functional=conditional_norm,
    make=lambda channels: SpatiallyAdaptiveNorm(channels, 1, hidden=2),
    rule=conditional_norm_rule("n *", per="n c *"),
    extra=lambda x: (torch.ones_like(x[:, :1]).cumsum(-1) - 2,),  # a slope, whatever x is
    running_state=True,
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift"}),
)
