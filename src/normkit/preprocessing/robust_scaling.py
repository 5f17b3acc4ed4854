"""Robust scaling by each feature's median and the range between two quantiles of the training data."""

from collections.abc import Iterable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ProtocolError, ShapeError
from normkit.core.support import Split, Support, per_shape, show
from normkit.preprocessing.fitting import Scaling, batches, constant_as_one, like, wide


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
            raise OptionError(
                f"RobustScaling: quantiles={quantiles}; wanted two increasing percentages, such as (25, 75)"
            )
        self.quantiles = (float(quantiles[0]), float(quantiles[1]))

    def fit(self, data: Tensor | Iterable[Any]) -> Self:
        parts = [self.prepare(batch) for batch in batches(data, "RobustScaling")]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(sorted({show(part.shape) for part in parts}))
            raise ShapeError(
                f"RobustScaling.fit: batches of {shapes} can't be concatenated; all axes but the first must agree"
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


CARD = Card(
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
