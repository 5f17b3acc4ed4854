"""Positional normalization: normalize each position over its channels, and pass the moments to a later layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.moments import moments
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Layer, check_several

_SUPPORT = Support("n c *", over="c")


class PositionalMoments(NamedTuple):
    """What positional normalization removes: mean and deviation of each position, with one channel."""

    mean: Tensor
    deviation: Tensor


@remembered
def positional_norm_rule(eps: float = 1e-5, correction: int = 1) -> Rule:
    """Positional normalization as data."""
    return Rule(_SUPPORT, Statistic("mean", "std", eps, correction=correction))


class PositionalNorm(Layer):
    """Normalize each position of each sample over its channels, without learned parameters.

    y = (x - E[x]) / sqrt(Var[x] + eps), with the unbiased variance, as the authors have it. The mean and deviation of each
    position carry the input's structure; ``moments(x)`` returns them, and ``moment_shortcut`` injects them into a later layer,
    such as a decoder's. With ``correction=0`` it is layer normalization over the channels, without weight and bias.

    Args:
        eps: added to the variance. Default: 1e-5.
        correction: 1 divides the variance by C - 1, 0 by C. Default: 1.

    Shape: (N, C, *); the output has the same shape.

    Raises:
        ShapeError: an input of one channel.

    Reference: Li, Wu, Weinberger, Belongie, "Positional Normalization" (2019), https://arxiv.org/abs/1907.04312.

    >>> PositionalNorm()(torch.tensor([[[1.0], [2.0], [3.0]]])).view(3)
    tensor([-1.0000,  0.0000,  1.0000])
    """

    shown = "eps={0.eps}, correction={0.correction}"

    def __init__(self, eps: float = 1e-5, correction: int = 1) -> None:
        super().__init__()
        self.eps, self.correction = eps, correction
        self.register_affine((), False, False)
        self.complete()

    def make_rule(self) -> Rule:
        return positional_norm_rule(self.eps, self.correction)

    def check(self, input: Tensor) -> None:
        check_several("PositionalNorm", input, _SUPPORT)

    def moments(self, input: Tensor) -> PositionalMoments:
        """Measure the mean and deviation of each position, (N, 1, *), differentiable, for ``moment_shortcut``."""
        return positional_moments(input, self.eps, self.correction)


def positional_norm(
    input: Tensor, eps: float = 1e-5, correction: int = 1, *, mask: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Positional normalization as a function; see PositionalNorm.

    >>> positional_norm(torch.tensor([[[1.0], [2.0], [3.0]]])).view(3)
    tensor([-1.0000,  0.0000,  1.0000])
    """
    check_several("positional_norm", input, _SUPPORT)
    return run(positional_norm_rule(eps, correction), input, mask=mask, backend=backend)


def positional_moments(input: Tensor, eps: float = 1e-5, correction: int = 1) -> PositionalMoments:
    """Measure the mean and deviation sqrt(Var + eps) of each position over the channels.

    >>> positional_moments(torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0)
    PositionalMoments(mean=tensor([[2.]]), deviation=tensor([[1.]]))
    """
    check_several("positional_moments", input, _SUPPORT)
    found = moments(input, (1,))
    var = found.unbiased() if correction else found.var
    return PositionalMoments(found.mean, (var + eps).sqrt())


def moment_shortcut(input: Tensor, moments: PositionalMoments) -> Tensor:
    """Inject moments of an earlier layer into a later one: deviation * x + mean.

    >>> moment_shortcut(torch.tensor([[-1.0, 1.0]]), PositionalMoments(torch.tensor([[2.0]]), torch.tensor([[3.0]])))
    tensor([[-1.,  5.]])
    """
    return torch.addcmul(moments.mean, input.to(moments.mean.dtype), moments.deviation).to(input.dtype)


CARD = Card(
    title="Positional normalization",
    word="pono",
    normalized_over="each sample and position, over its channels",
    paper=paper("li2019positional"),
    use_cases="generative networks with an encoder and a decoder: the moments carry structure across",
    strengths="independent of the batch and of other positions; its moments are used, not discarded",
    weaknesses="removes the strength of features at each position from the main path",
    module=PositionalNorm,
    functional=positional_norm,
    make=lambda channels: PositionalNorm(),
    build=lambda at: PositionalNorm(at.eps),
    takes=(),
    rule=positional_norm_rule(),
    invariances=frozenset({"weight scale", "weight shift", "data scale", "sample scale"}),
)
