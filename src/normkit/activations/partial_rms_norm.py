"""Partial RMS normalization: the root mean square of the first features replaces that of all."""

from typing import Any

from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError
from normkit.core.module import Module
from normkit.core.place import positive_number
from normkit.core.statistic import Guard, Statistic
from normkit.core.support import Support
from normkit.engine.layer import check_last

_SUPPORT = Support("* d", over="d")


class PartialRMSNorm(Module):
    """Divide each token by the root mean square of its first features.

    y = weight * x / (sqrt(E[x_1^2 .. x_k^2]) + eps) with k = int(D * fraction): all D features are divided. A fraction of 1 is
    RMS normalization. Training and evaluation compute the same.

    Args:
        features: features D.
        fraction: fraction of the features that are measured, in (0, 1]. Default: 0.0625, as published.
        eps: keeps the divisor above zero. Default: 1e-8.
        guard: where eps enters: ``"outside"`` the root (added, as in the paper's code), ``"inside"`` it, or as a ``"floor"``.
            Default: "outside".
        elementwise_affine: whether there is a weight (starts at 1). Default: True.
        bias: True adds a bias (starts at 0). Default: False.

    Shape:
        (*, D); the output has the same shape.

    Raises:
        OptionError: the fraction leaves no feature, or is above 1; an unknown guard.
        ShapeError: the input does not end in ``features``.

    Reference:
        Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), https://arxiv.org/abs/1910.07467.

    >>> PartialRMSNorm(4, fraction=0.5)(torch.tensor([[3.0, 3.0, 6.0, 9.0]])).detach()
    tensor([[1., 1., 2., 3.]])
    """

    shown = "{0.features}, fraction={0.fraction}, eps={0.eps}, guard={0.guard!r}"
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        fraction: float = 0.0625,
        eps: float = 1e-8,
        elementwise_affine: bool = True,
        *,
        guard: Guard = "outside",
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.measured = _count("PartialRMSNorm", features, fraction)
        self.features, self.fraction, self.eps = features, fraction, eps
        self.guard: Guard = guard
        Statistic(None, "rms", eps, guard)  # refuses another guard now rather than at the first input
        self.register_affine((features,), elementwise_affine, bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        check_last("PartialRMSNorm", input, self.features)
        return _normalize(input, self.measured, self.weight, self.bias, Statistic(None, "rms", self.eps, self.guard))


def partial_rms_norm(
    input: Tensor,
    fraction: float = 0.0625,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-8,
    *,
    guard: Guard = "outside",
) -> Tensor:
    """Partial RMS normalization over the last axis as a function; see PartialRMSNorm.

    >>> partial_rms_norm(torch.tensor([[3.0, 3.0, 6.0, 9.0]]), 0.5)
    tensor([[1., 1., 2., 3.]])
    """
    measured = _count("partial_rms_norm", input.shape[-1], fraction)
    return _normalize(input, measured, weight, bias, Statistic(None, "rms", eps, guard))


def _count(who: str, features: int, fraction: float) -> int:
    count = int(features * fraction)
    if not 1 <= count <= features:
        raise OptionError(
            f"{who}: fraction={fraction} of {features} features measures {count}; wanted at least 1 and at most all: "
            f"a fraction from {1 / features:.4g} to 1"
        )
    return count


def _normalize(x: Tensor, measured: int, weight: Tensor | None, bias: Tensor | None, statistic: Statistic) -> Tensor:
    part = x[..., :measured]
    _, scale, _ = statistic.measure(part, _SUPPORT.split(part.shape))
    assert scale is not None
    return Affine("d").apply(x / scale, _SUPPORT.split(x.shape), weight, bias).to(x.dtype)


CARD = Card(
    title="Partial root mean square normalization (pRMSNorm)",
    word="prms",
    normalized_over="each sample or token, over the first of its features",
    formula="y = weight * x / (sqrt(E[x_1^2 .. x_k^2]) + eps)",
    paper=Paper(
        "Zhang, Biao and Sennrich, Rico",
        "Root Mean Square Layer Normalization",
        2019,
        "https://arxiv.org/abs/1910.07467",
    ),
    use_cases="where the reduction dominates the cost",
    strengths="as good as RMS normalization in the paper's tasks, measuring 6.25 % of the features",
    weaknesses="seldom faster in practice, as all features must be read anyway; noisy where features are few or differ much",
    module=PartialRMSNorm,
    functional=partial_rms_norm,
    make=lambda features: PartialRMSNorm(features, fraction=0.5),
    build=lambda at: PartialRMSNorm(at.channels, float(at.option), elementwise_affine=at.affine, **at.factory),
    option=positive_number("FRACTION", 0.0625, of=lambda norm: norm.fraction, most=1.0),
    over="d",
    layout="* d",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)
