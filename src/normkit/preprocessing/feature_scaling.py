"""Feature scaling by each feature's range, largest value, deviation or quantiles over the training data."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ProtocolError, ShapeError
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Split, Support, per_shape, show
from normkit.preprocessing.fitting import PER_FEATURE, Scaling, batches, constant_as_one, deviation, like, wide


class MinMaxScaling(Scaling):
    """Map the range of each feature in the training data to a given one.

    y = low + (x - min) / (max - min) * (high - low). A feature that is constant in the training data becomes low. Data outside
    the training range falls outside low and high, unless clipped.

    Args:
        low: image of the smallest training value. Default: 0.
        high: image of the largest training value. Default: 1.
        clip: whether to clip to low and high. Default: False.
        support: which elements share a statistic. Default: ``Support("n *", over="n")``, per feature.
        dtype: dtype of the statistics. Default: float64.

    Shape: The support's axes; the output has the same shape.

    Raises:
        OptionError: low is not below high.

    Reference: Han, Kamber, Pei, "Data Mining" (2011), https://doi.org/10.1016/C2009-0-61819-5, section 3.5.2.

    >>> scaling = MinMaxScaling().fit(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    >>> scaling(torch.tensor([[2.0, 40.0]]))
    tensor([[0.5000, 1.5000]])
    """

    statistics = ("minimum", "maximum")
    minimum: Tensor
    maximum: Tensor

    def __init__(
        self,
        low: float = 0.0,
        high: float = 1.0,
        *,
        clip: bool = False,
        support: Support | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(support, device=device, dtype=dtype)
        if not low < high or not math.isfinite(high - low):
            raise OptionError(f"MinMaxScaling: low={low}, high={high}; wanted two finite numbers, low below high")
        self.offset, self.gain, self.clip = float(low), float(high) - float(low), clip

    def center(self) -> Tensor:
        return self.minimum

    def scale(self) -> Tensor:
        return constant_as_one(self.maximum - self.minimum)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.clamp(self.offset, self.offset + self.gain) if self.clip else y

    def extra_repr(self) -> str:
        return f"{self.offset:g}, {self.offset + self.gain:g}, clip={self.clip}, {super().extra_repr()}"


class ZScore(Scaling):
    """Give each feature mean 0 and deviation 1 over the training data.

    y = (x - E[x]) / sqrt(Var[x]), with the population variance. A feature that is constant in the training data is only
    centred, and becomes 0. ``support`` and ``dtype`` are those of MinMaxScaling.

    Reference: LeCun, Bottou, Orr, Müller, "Efficient BackProp" (1998), https://doi.org/10.1007/3-540-49430-8_2, section 4.3.

    >>> score = ZScore().partial_fit(torch.tensor([[1.0], [2.0]])).partial_fit(torch.tensor([[6.0]]))
    >>> score.mean, score.var
    (tensor([3.], dtype=torch.float64), tensor([4.6667], dtype=torch.float64))
    >>> score(torch.tensor([[3.0], [6.0]])).T
    tensor([[0.0000, 1.3887]])
    """

    statistics = ("mean", "var")
    mean: Tensor
    var: Tensor

    def center(self) -> Tensor:
        return self.mean

    def scale(self) -> Tensor:
        return deviation(self.mean, self.var, self.count)


class MeanNormalization(Scaling):
    """Give each feature mean 0 and range 1 over the training data.

    y = (x - E[x]) / (max - min). A feature that is constant in the training data is only centred, and becomes 0. ``support``
    and ``dtype`` are those of MinMaxScaling.

    Reference: Ng, "Machine Learning", lecture 4 (2011), https://www.coursera.org/learn/machine-learning.

    >>> MeanNormalization().fit(torch.tensor([[1.0], [2.0], [6.0]]))(torch.tensor([[1.0], [6.0]])).T
    tensor([[-0.4000,  0.6000]])
    """

    statistics = ("mean", "minimum", "maximum")
    mean: Tensor
    minimum: Tensor
    maximum: Tensor

    def center(self) -> Tensor:
        return self.mean

    def scale(self) -> Tensor:
        return constant_as_one(self.maximum - self.minimum)


class MaxAbsScaling(Scaling):
    """Divide each feature by its largest absolute value in the training data; zeros stay zeros.

    y = x / max|x|. A feature that is zero throughout the training data is unchanged. ``support`` and ``dtype`` are those of
    MinMaxScaling.

    Reference: Pedregosa et al., "Scikit-learn" (2011), https://jmlr.org/papers/v12/pedregosa11a.html.

    >>> MaxAbsScaling().fit(torch.tensor([[1.0], [-4.0]]))(torch.tensor([[1.0], [8.0]])).T
    tensor([[0.2500, 2.0000]])
    """

    statistics = ("minimum", "maximum")
    minimum: Tensor
    maximum: Tensor

    def center(self) -> Tensor:
        return torch.zeros_like(self.minimum)

    def scale(self) -> Tensor:
        return constant_as_one(torch.maximum(self.minimum.abs(), self.maximum.abs()))


def min_max_scaling(
    input: Tensor, low: float = 0.0, high: float = 1.0, *, clip: bool = False, support: Support | None = None
) -> Tensor:
    """Scale data by its own range, which is taken as constant in the gradient; see MinMaxScaling.

    >>> min_max_scaling(torch.tensor([[1.0], [2.0], [3.0]]), -1, 1).T
    tensor([[-1.,  0.,  1.]])
    """
    return MinMaxScaling(low, high, clip=clip, support=support, **like(input)).fit(input)(input)


def z_score(input: Tensor, support: Support | None = None) -> Tensor:
    """Standardize data by its own mean and deviation, which are taken as constant in the gradient; see ZScore.

    >>> z_score(torch.tensor([[1.0], [3.0]])).T
    tensor([[-1.,  1.]])
    """
    return ZScore(support, **like(input)).fit(input)(input)


def mean_normalization(input: Tensor, support: Support | None = None) -> Tensor:
    """Scale data by its own mean and range, which are taken as constant in the gradient; see MeanNormalization.

    >>> mean_normalization(torch.tensor([[1.0], [3.0]])).T
    tensor([[-0.5000,  0.5000]])
    """
    return MeanNormalization(support, **like(input)).fit(input)(input)


def max_abs_scaling(input: Tensor, support: Support | None = None) -> Tensor:
    """Scale data by its own largest absolute value, which is taken as constant in the gradient; see MaxAbsScaling.

    >>> max_abs_scaling(torch.tensor([[1.0], [-4.0]])).T
    tensor([[ 0.2500, -1.0000]])
    """
    return MaxAbsScaling(support, **like(input)).fit(input)(input)


_card = partial(Card, kind="input", normalized_over="each feature, over the training data", streams=True)

CARD_MIN_MAX = _card(
    title="Min-max scaling",
    formula="y = low + (x - min[x]) / (max[x] - min[x]) * (high - low)",
    paper=paper("han2011data"),
    use_cases="inputs with known bounds, such as pixels; targets of a sigmoid or tanh output",
    strengths="known bounds; no cost; a constant feature does no harm",
    weaknesses="one outlier compresses all else; data outside the training range exceeds the bounds unless clipped",
    module=MinMaxScaling,
    functional=min_max_scaling,
    rule=Rule(PER_FEATURE, Statistic("min", "range", 0.0, "floor")),
)

CARD_Z_SCORE = _card(
    title="Standardization (z-score)",
    formula="y = (x - E[x]) / sqrt(Var[x])",
    paper=paper("lecun1998efficient"),
    use_cases="the default for real-valued inputs and regression targets",
    strengths="one learning rate fits all features; removes the mean's huge eigenvalue from the curvature of the loss",
    weaknesses="outliers affect both statistics; correlation between features remains",
    module=ZScore,
    functional=z_score,
    rule=Rule(PER_FEATURE, Statistic("mean", "std", 0.0)),
)

CARD_MEAN = _card(
    title="Mean normalization",
    formula="y = (x - E[x]) / (max[x] - min[x])",
    paper=paper("ng2011machine"),
    use_cases="bounded inputs that should be centred",
    strengths="centred, and within [-1, 1] on the training data",
    weaknesses="one outlier compresses all else; deviations still differ between features",
    module=MeanNormalization,
    functional=mean_normalization,
    rule=Rule(PER_FEATURE, Statistic("mean", "range", 0.0, "floor")),
)

CARD_MAX_ABS = _card(
    title="Max-abs scaling",
    formula="y = x / max|x|",
    paper=paper("pedregosa2011scikitlearn"),
    use_cases="sparse inputs: counts and bags of words",
    strengths="keeps zeros and signs; within [-1, 1] on the training data",
    weaknesses="does not centre; one outlier compresses all else",
    module=MaxAbsScaling,
    functional=max_abs_scaling,
    rule=Rule(PER_FEATURE, Statistic(None, "max", 0.0, "floor")),
)


class RobustScaling(Scaling):
    """Give each feature median 0 and interquartile range 1 over the training data.

    y = (x - median[x]) / (Q3[x] - Q1[x]), with quantiles interpolated linearly between order statistics. A feature whose
    quantiles agree is only centred.

    Quantiles of parts do not give the quantile of the whole, so ``partial_fit`` is refused; ``fit`` takes any iterable and
    holds all of it in memory while measuring.

    Args:
        quantiles: the two quantiles in percent. Default: (25, 75).
        support: which elements share a statistic. Default: ``Support("n *", over="n")``, per feature.
        dtype: dtype of the statistics. Default: float64.

    Shape: The support's axes; the output has the same shape.

    Raises:
        OptionError: the quantiles are not increasing numbers from 0 to 100.
        ProtocolError: ``partial_fit``.

    Reference: Pedregosa et al., "Scikit-learn" (2011), https://jmlr.org/papers/v12/pedregosa11a.html.

    >>> scaling = RobustScaling().fit(torch.tensor([[1.0], [2.0], [3.0], [4.0], [1000.0]]))
    >>> scaling(torch.tensor([[1.0], [4.0], [1000.0]])).T
    tensor([[ -1.0000,   0.5000, 498.5000]])
    """

    statistics = ("median", "spread")
    median: Tensor
    spread: Tensor

    def __init__(
        self,
        quantiles: tuple[float, float] = (25.0, 75.0),
        *,
        support: Support | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(support, device=device, dtype=dtype)
        if not 0 <= quantiles[0] < quantiles[1] <= 100:
            raise OptionError(f"RobustScaling: quantiles={quantiles}; wanted two rising percentages, such as (25, 75)")
        self.quantiles = (float(quantiles[0]), float(quantiles[1]))

    def fit(self, data: Tensor | Iterable[Any]) -> Self:
        parts = [self.prepare(batch) for batch in batches(data, "RobustScaling")]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(sorted({show(part.shape) for part in parts}))
            raise ShapeError(
                f"RobustScaling.fit: batches of {shapes} can't be concatenated; wanted all axes but the first alike"
            )
        return super().fit(torch.cat(parts) if parts else [])

    def partial_fit(self, batch: Tensor | tuple[Any, ...] | list[Any]) -> NoReturn:
        raise ProtocolError(
            "RobustScaling.partial_fit: quantiles of parts do not give the quantile of the whole; pass everything to fit, "
            "which takes any iterable, or use ZScore, which streams"
        )

    def measure(self, x: Tensor, split: Split) -> dict[str, Tensor]:
        kept = per_shape(" ".join(self.support.kept), split)
        stay = [d for d in range(x.dim()) if d not in split.dims]
        rising = wide(x).permute(*split.dims, *stay).reshape(split.count, *kept).sort(0).values
        low, middle, high = (_quantile(rising, q / 100) for q in (self.quantiles[0], 50.0, self.quantiles[1]))
        return {"median": middle, "spread": high - low}

    def center(self) -> Tensor:
        return self.median

    def scale(self) -> Tensor:
        return constant_as_one(self.spread)

    def _pieces(self, x: Tensor) -> Iterable[Tensor]:
        return [x]

    def extra_repr(self) -> str:
        return f"quantiles={self.quantiles}, {super().extra_repr()}"


def robust_scaling(
    input: Tensor, quantiles: tuple[float, float] = (25.0, 75.0), *, support: Support | None = None
) -> Tensor:
    """Scale data by its own median and quantiles, which are taken as constant in the gradient; see RobustScaling.

    >>> robust_scaling(torch.tensor([[1.0], [2.0], [3.0], [4.0], [1000.0]])).T
    tensor([[ -1.0000,  -0.5000,   0.0000,   0.5000, 498.5000]])
    """
    return RobustScaling(quantiles, support=support, **like(input)).fit(input)(input)


def _quantile(rising: Tensor, q: float) -> Tensor:
    # torch.quantile takes no more than 2^24 elements.
    position = q * (rising.shape[0] - 1)
    below = int(position)
    above = min(below + 1, rising.shape[0] - 1)
    return torch.lerp(rising[below], rising[above], position - below)


CARD_ROBUST_SCALING = Card(
    title="Robust scaling",
    kind="input",
    normalized_over="each feature, over the training data",
    formula="y = (x - median[x]) / (Q3[x] - Q1[x])",
    paper=paper("pedregosa2011scikitlearn"),
    use_cases="measured inputs with outliers or heavy tails",
    strengths="up to a quarter of the data may be outliers without affecting the statistics",
    weaknesses="does not stream: fitting holds all data in memory; outliers stay as large as they are",
    module=RobustScaling,
    functional=robust_scaling,
)
