"""Group normalization: normalize each sample over groups of channels and all positions."""

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import ShapeError
from normkit.core.place import groups
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, check_groups, show
from normkit.engine.call import Save
from normkit.engine.dispatch import Activation, Backend, run
from normkit.engine.layer import Layer, check_channels, check_layout


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
            keeps anyway: the normalized input is then computed again from it. Default: "input".

    Shape: (N, C, *) or, with channels last, (N, *, C); the output has the same shape.

    Raises:
        OptionError: the channels do not split into the groups; an unknown layout.
        ShapeError: a number of channels other than ``num_channels``; a single sample with one value per group, as in torch.
        OptionError: with ``save="output"``, an activation that has no inverse or, in training, a gain too small to be undone.

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
        _check_several("GroupNorm", self.num_groups, input)


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
        _check_several("group_norm", num_groups, input)
    return run(rule, input, weight, bias, mask=mask, backend=backend)


def _check_several(who: str, groups: int, input: Tensor) -> None:
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
