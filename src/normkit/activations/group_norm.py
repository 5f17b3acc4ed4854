"""Group normalization: normalize each sample over groups of channels and all positions, or those in a window."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError
from normkit.core.module import Module, whole
from normkit.core.moments import accumulation_dtype, moments
from normkit.core.place import groups, whole_number
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, check_groups, divisors, show
from normkit.engine.call import Save
from normkit.engine.dispatch import Activation, Backend, run
from normkit.engine.layer import Layer, check_channels, check_channels_first, check_layout
from normkit.engine.window import sliding_moments

_CHANNELS_FIRST = Support("n c *", over="*")


@remembered
def group_norm_rule(num_groups: int, eps: float = 1e-5, layout: str = "n c *") -> Rule:
    """Group normalization as data."""
    support = Support(check_layout("GroupNorm", layout).replace("c", "(g c)"), over="c *", g=num_groups)
    return Rule(support, Statistic("mean", "std", eps), Affine("(g c)"))


class GroupNorm(Layer, nn.GroupNorm):
    """Split each sample's channels into groups and normalize each over its channels and all positions.

    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias, weight and bias per channel, the same in training and evaluation. One
    group gives layer normalization over the sample, C groups give instance normalization. ``torch.nn.GroupNorm``, with accurate
    statistics in every memory format.

    Args:
        num_groups: groups G; divides ``num_channels``.
        num_channels: channels C.
        eps: added to the variance. Default: 1e-5.
        affine: whether there are a weight (starts at 1) and a bias (at 0). Default: True.
        bias: False omits the bias. Default: True.
        layout: ``"n c *"`` for channels first, ``"n * c"`` for channels last. Default: ``"n c *"``.
        activation: fused activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or None.
            Default: None.
        save: what is kept for the backward pass: ``"input"``, or the ``"output"``, which a convolution or linear layer behind it
            keeps anyway: the normalized input is then computed again from it, and nothing may change the output in place. Where
            no kernel does so the input is kept, as ``explain`` says. Default: "input".

    Shape: (N, C, *) or, with channels last, (N, *, C); the output has the same shape.

    Raises:
        OptionError: the channels do not split into the groups; an unknown layout.
        ShapeError: a number of channels other than ``num_channels``; a single sample with one value per group, as in torch.
        OptionError: with ``save="output"``, an activation without an inverse or, where gradients are recorded, a gain too small.

    Reference: Wu and He, "Group Normalization" (2018), https://arxiv.org/abs/1803.08494.

    >>> GroupNorm(2, 4)(torch.tensor([[1.0, 3.0, 10.0, 30.0]])).detach()
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """

    unusual: ClassVar = {"layout": "n c *", "activation": None, "save": "input"}

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        layout: str = "n c *",
        activation: Activation | None = None,
        save: Save = "input",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_groups("GroupNorm", num_channels, num_groups)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation, self.layout, self.save = activation, layout, save
        self.complete(bias)

    def make_rule(self) -> Rule:
        return group_norm_rule(self.num_groups, self.eps, self.layout)

    def check(self, input: Tensor) -> None:
        check_channels("GroupNorm", input, self.num_channels, "num_channels", self.layout)
        _check_group_norm("GroupNorm", self.num_groups, input)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    layout: str = "n c *",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Group normalization as a function, with the arguments of ``torch.nn.functional.group_norm``; see GroupNorm.

    Channels that do not split into the groups raise ShapeError.

    >>> group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), 2)
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
    rule = group_norm_rule(num_groups, eps, layout)
    if input.dim() >= 2:
        channels = input.shape[-1 if layout == "n * c" else 1]
        check_groups("group_norm", channels, num_groups, f" (input {show(input.shape)})")
        _check_group_norm("group_norm", num_groups, input)
    return run(rule, input, weight, bias, mask=mask, backend=backend)


def _check_group_norm(who: str, groups: int, input: Tensor) -> None:
    """Refuse what torch refuses: it accepts one value per group if there are several samples, and returns the bias."""
    if input.shape[0] == 1 and input.numel() == groups:
        raise ShapeError(
            f"{who}: one value in each group (input {show(input.shape)}, num_groups={groups}), so the output is the bias. "
            "Expected more than 1 value per channel when training: use fewer groups, or a larger input"
        )


CARD = Card(
    title="Group normalization",
    word="gn",
    normalized_over="each sample and group of channels, over the group's channels and all positions",
    paper=paper("wu2018group"),
    use_cases="detection, segmentation, video, diffusion: convolutional networks with few samples per batch",
    strengths="independent of the batch size; the same in training and at inference",
    weaknesses="behind batch normalization at large batches; the number of groups is one more choice; can't be folded",
    module=GroupNorm,
    functional=group_norm,
    make=lambda channels: GroupNorm(math.gcd(2, channels), channels),
    build=lambda at: GroupNorm(at.groups, at.channels, at.eps, at.affine, bias=at.bias, layout=at.axes, **at.factory),
    option=groups(of=lambda norm: norm.num_groups),
    axes=("n c *", "n * c"),
    rule=group_norm_rule(2),
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)


class LocalContextNorm(Module):
    """Normalize each element by the mean and deviation of its group of channels in a window of positions around it.

    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias, E and Var over the channels of the group and the part of the window
    inside the image. A window that covers the image from every position gives group normalization. The same in training
    and evaluation.

    Args:
        num_features: channels C.
        channels_per_group: channels that share statistics; divides C. Default: 2.
        window: positions along each spatial axis, one number for all axes or one per axis. Default: 227.
        eps: added to the variance. Default: 1e-5.
        affine: whether there are a weight (starts at 1) and a bias (at 0), per channel. Default: True.

    Shape: (N, C, *); the output has the same shape.

    Raises:
        OptionError: the channels do not split into the groups, or a window below 1.
        ShapeError: a number of channels other than ``num_features``, or another number of spatial axes than of windows.

    Reference: Ortiz, Robinson, Morris, Fuentes, Kiekintveld, Hassan, Jojic (2020), https://arxiv.org/abs/1912.05845.

    >>> LocalContextNorm(1, 1, window=3)(torch.tensor([[[1.0, 3.0, 3.0]]])).detach()
    tensor([[[-1.0000,  0.7071,  0.0000]]])
    """

    shown = "{0.num_features}, {0.channels_per_group}, window={0.window}, eps={0.eps}"
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        channels_per_group: int = 2,
        window: int | Sequence[int] = 227,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features, self.channels_per_group, self.eps = num_features, channels_per_group, eps
        self.window = tuple(map(whole, window)) if isinstance(window, Sequence) else window
        _check_local_context(num_features, channels_per_group, self.window)
        self.register_affine((num_features,), affine, affine, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        check_channels("LocalContextNorm", input, self.num_features, "num_features", "n c *")
        return local_context_norm(input, self.channels_per_group, self.window, self.weight, self.bias, self.eps)


def local_context_norm(
    input: Tensor,
    channels_per_group: int = 2,
    window: int | Sequence[int] = 227,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Local context normalization as a function; see LocalContextNorm.

    >>> local_context_norm(torch.tensor([[[1.0, 3.0, 3.0]]]), 1, window=3)
    tensor([[[-1.0000,  0.7071,  0.0000]]])
    """
    wide = input.to(accumulation_dtype(input.dtype))
    check_channels_first("local_context_norm", input)
    _check_local_context(input.shape[1], channels_per_group, window)
    axes = input.dim() - 2
    windows = list(window) if isinstance(window, Sequence) else [window] * axes
    if len(windows) != axes:
        raise ShapeError(
            f"local_context_norm: {len(windows)} windows for {axes} spatial axes ({show(input.shape)}); give one per axis"
        )
    groups = wide.unflatten(1, (-1, channels_per_group))
    each = moments(groups, (2,))  # over the group at each position first: fewer elements are left to slide over
    found = sliding_moments(each, [(dim + 3, size) for dim, size in enumerate(windows)])
    y = ((groups - found.mean) * (found.var + eps).rsqrt()).flatten(1, 2)
    return Affine("c").apply(y, _CHANNELS_FIRST.split(input.shape), weight, bias).to(input.dtype)


def _check_local_context(channels: int, per_group: int, window: int | Sequence[int]) -> None:
    if per_group < 1 or channels % per_group:
        raise OptionError(
            f"LocalContextNorm: {channels} channels do not split into groups of channels_per_group={per_group}; "
            f"it must divide {channels}: {divisors(channels)}"
        )
    if any(size < 1 for size in (window if isinstance(window, Sequence) else [window])):
        raise OptionError(f"LocalContextNorm: window={window}; wanted whole numbers from 1")


CARD_LOCAL_CONTEXT = Card(
    title="Local context normalization",
    word="context",
    normalized_over="each element, over its group of channels in a window of positions around it",
    formula="y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias",
    paper=paper("ortiz2020local"),
    use_cases="dense prediction on large images with uneven light: segmentation, aerial images, detection",
    strengths="independent of the batch; distant parts of an image do not affect one another",
    weaknesses="slower than group normalization; the window is one more choice",
    module=LocalContextNorm,
    functional=local_context_norm,
    make=lambda channels: LocalContextNorm(channels, math.gcd(2, channels), window=3),
    build=lambda at: LocalContextNorm(
        at.channels, math.gcd(2, at.channels), int(at.option), at.eps, at.affine, **at.factory
    ),
    option=whole_number("WINDOW", 227, of=lambda norm: norm.window),
    over="c *",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)
