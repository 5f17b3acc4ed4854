"""Scaling of each sample separately, to unit length, or to zero mean and equal contrast; there is nothing to fit."""

import math
from collections.abc import Iterable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ProtocolError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype, moments
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.preprocessing.fitting import batches, refuse_unknown

PER_SAMPLE = Support("n *", over="*")


class _PerSample(Module):
    """Base of data normalizations that follow the protocol of ``Fitted`` but keep nothing."""

    support: Support
    lost: str

    def fit(self, data: Tensor | Iterable[Any]) -> Self:
        """Check the data, OptionError for NaN or infinity; nothing is kept, as each sample is scaled separately."""
        who = type(self).__name__
        for x in batches(data, who):
            accumulation_dtype(x.dtype)
            split = self.support.split(x.shape)
            refuse_unknown(x.reshape(split.shape), split, f"{who}.fit")
        return self

    def partial_fit(self, batch: Tensor | tuple[Any, ...] | list[Any]) -> Self:
        """Check one batch, as ``fit`` does."""
        return self.fit([batch])

    def transform(self, x: Tensor) -> Tensor:
        """Scale each sample: the same as calling the module."""
        return self(x)

    def inverse_transform(self, y: Tensor) -> NoReturn:
        """Refuse, by ProtocolError: the divisor is not kept."""
        raise ProtocolError(f"{type(self).__name__}.inverse_transform: {self.lost} is not kept; keep the input")


class UnitLength(_PerSample):
    """Divide each sample by its norm; a zero sample stays zero.

    y = x / ||x||_p.

    Args:
        order: order p of the norm: 1, 2 or infinity. Default: 2.
        support: what is one sample. Default: ``Support("n *", over="*")``; ``Support("* d", over="d")`` for each token.

    Shape: The support's axes; the output has the same shape.

    Raises:
        OptionError: an unknown order.

    Reference: Salton, Wong, Yang (1975), https://doi.org/10.1145/361219.361220.

    >>> UnitLength()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    shown = "order={0.order:g}, support={0.support}"
    lost = "the length of a sample"

    def __init__(self, order: float = 2, *, support: Support = PER_SAMPLE) -> None:
        super().__init__()
        check_options("UnitLength", order=(order, (1, 2, math.inf)))
        self.order, self.support = float(order), support

    def forward(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        split = self.support.split(x.shape)
        z = x.reshape(split.shape).to(dtype)
        if 0 in split.shape:
            return x.clone()
        # First by the largest element, so that squares neither overflow nor vanish.
        largest = z.abs().amax(split.dims, keepdim=True).detach()
        z = z / torch.where(largest > 0, largest, 1.0)
        length = torch.linalg.vector_norm(z, self.order, dim=split.dims, keepdim=True)
        return (z / torch.where(length > 0, length, 1.0)).reshape(x.shape).to(x.dtype)


class GlobalContrast(_PerSample):
    """Give each image mean 0 and the same contrast, over all channels and positions.

    y = scale * (x - E[x]) / max(eps, sqrt(regularizer + Var[x])). A constant image becomes zero.

    Args:
        scale: deviation of the output. Default: 1.
        regularizer: added to the variance, so that nearly constant images are not amplified. Default: 0.
        eps: smallest divisor. Default: 1e-8.
        support: what is one image. Default: ``Support("n *", over="*")``.

    Shape: The support's axes; the output has the same shape.

    Raises:
        OptionError: a negative regularizer, or an eps that is not above 0.

    Reference: Goodfellow, Bengio, Courville (2016), https://www.deeplearningbook.org, section 12.2.1.1.

    >>> GlobalContrast()(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """

    shown = "scale={0.scale}, regularizer={0.regularizer}, eps={0.eps}, support={0.support}"
    lost = "the mean and contrast of an image"

    def __init__(
        self, scale: float = 1.0, regularizer: float = 0.0, eps: float = 1e-8, *, support: Support = PER_SAMPLE
    ) -> None:
        super().__init__()
        if not regularizer >= 0 or not eps > 0:
            raise OptionError(
                f"GlobalContrast: regularizer={regularizer}, eps={eps}; wanted numbers from 0, and above 0"
            )
        self.scale, self.regularizer, self.eps, self.support = scale, regularizer, eps, support

    def forward(self, x: Tensor) -> Tensor:
        accumulation_dtype(x.dtype)
        split = self.support.split(x.shape)
        if 0 in split.shape:
            return x.clone()
        z = x.reshape(split.shape)
        found = moments(z, split.dims)
        power = found.var + self.regularizer
        enough = power > self.eps**2  # decided before the root, whose derivative at zero is infinite
        contrast = torch.where(enough, torch.where(enough, power, 1.0).sqrt(), self.eps)
        y = self.scale * (z.to(found.mean.dtype) - found.mean) / contrast
        return y.reshape(x.shape).to(x.dtype)


def unit_length(input: Tensor, order: float = 2, *, support: Support = PER_SAMPLE) -> Tensor:
    """Divide each sample by its norm; see UnitLength.

    >>> unit_length(torch.tensor([[1.0, 3.0]]), 1)
    tensor([[0.2500, 0.7500]])
    """
    return UnitLength(order, support=support)(input)


def global_contrast(
    input: Tensor, scale: float = 1.0, regularizer: float = 0.0, eps: float = 1e-8, *, support: Support = PER_SAMPLE
) -> Tensor:
    """Give each image mean 0 and the same contrast; see GlobalContrast.

    >>> global_contrast(torch.tensor([[1.0, 3.0]]), scale=2.0)
    tensor([[-2.,  2.]])
    """
    return GlobalContrast(scale, regularizer, eps, support=support)(input)


CARD_UNIT_LENGTH = Card(
    title="Unit length",
    kind="input",
    normalized_over="each sample, over its features",
    formula="y = x / ||x||_p",
    paper=paper("salton1975a"),
    use_cases="text vectors, embeddings, spectra: where direction carries the meaning",
    strengths="nothing to fit; the product of two samples is the cosine of their angle",
    weaknesses="the length is lost; the scales of features remain",
    module=UnitLength,
    functional=unit_length,
    rule=Rule(PER_SAMPLE, Statistic(None, "norm", 0.0, "floor")),
    streams=True,
)

CARD_GLOBAL_CONTRAST = Card(
    title="Global contrast normalization",
    kind="input",
    normalized_over="each image, over its channels and positions",
    formula="y = scale * (x - E[x]) / max(eps, sqrt(regularizer + Var[x]))",
    paper=paper("goodfellow2016deep"),
    use_cases="natural images under changing light, before whitening",
    strengths="nothing to fit; removes the brightness and contrast of a photograph",
    weaknesses="amplifies noise in nearly constant images unless regularized; brightness and contrast are lost",
    module=GlobalContrast,
    functional=global_contrast,
    rule=Rule(PER_SAMPLE, Statistic("mean", "std", 0.0)),
    streams=True,
)
