"""Adaptive instance normalization: gives one image's channels the statistics of another's."""

from dataclasses import replace

import torch
from torch import Tensor

from normkit.core.card import Card, Paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype, moments
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, show
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import check_several

_RULE = Rule(Support("n c *", over="*"), Statistic("mean", "std", 1e-5), Affine("n c"))


@remembered
def adaptive_instance_norm_rule(eps: float = 1e-5) -> Rule:
    """Adaptive instance normalization as data; weight and bias are a style's deviation and mean, per sample and channel."""
    return _RULE if eps == 1e-5 else replace(_RULE, statistic=Statistic("mean", "std", eps))


class AdaptiveInstanceNorm(Module):
    """Give each channel of a content the mean and deviation that the same channel has in a style.

    y = sd(s) * (x - E[x]) / sqrt(Var[x] + eps) + E[s], with E and Var of each sample and channel over the positions and
    sd(s) = sqrt(Var[s] + eps); the result is (1 - strength) * x + strength * y. Nothing is learned, and a content with itself
    as style is unchanged.

    Args:
        strength: the share of the style: 0 leaves the content unchanged, 1 replaces its statistics. Default: 1.
        eps: added to the variances. Default: 1e-5.

    Shape:
        content (N, C, *) and style (N or 1, C, *), of any spatial sizes, to the shape of the content.

    Raises:
        ShapeError: content and style do not fit, or the content has a single position.

    Reference:
        Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization" (2017),
        https://arxiv.org/abs/1703.06868.

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
                f"adaptive_instance_norm: strength of shape {show(strength.shape)}; wanted one value, or {input.shape[0]}"
            )
        strength = strength.to(input.dtype).reshape([-1] + [1] * (input.dim() - 1))
    elif strength == 1:
        return y
    return torch.lerp(input if mask is None else torch.where(mask, input, 0.0), y, strength)


CARD = Card(
    title="Adaptive instance normalization",
    wordless="it takes a style as well as its input",
    normalized_over="each sample and channel, over all positions; scaled and shifted to the statistics of a style",
    formula="y = sd[s] * (x - E[x]) / sqrt(Var[x] + eps) + E[s]",
    paper=Paper(
        "Huang, Xun and Belongie, Serge",
        "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
        2017,
        "https://arxiv.org/abs/1703.06868",
    ),
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
