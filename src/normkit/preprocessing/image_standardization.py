"""Image standardization by the mean and deviation of each channel over a data set, published or measured."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ProtocolError, ShapeError
from normkit.core.support import Support
from normkit.preprocessing.fitting import Scaling, deviation, like

Constants = tuple[Sequence[float], Sequence[float]]

# Mean and deviation of each channel, of pixels from 0 to 1. CIFAR's deviations are those over all pixels of the training set.
PUBLISHED: dict[str, Constants] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
}

_SUPPORTS = {
    "n c *": Support("n c *", over="n *"),
    "n * c": Support("n * c", over="n *"),
    "c *": Support("c *", over="*"),
}


class ImageStandardization(Scaling):
    """Give each channel of images mean 0 and deviation 1 over a data set.

    y = (x / maximum - mean_c) / std_c. The constants are published ones, chosen by name, or given, or measured by ``fit``.

    Args:
        statistics: ``"cifar10"``, ``"cifar100"``, ``"imagenet"``, ``"mnist"``; or (means, deviations) of pixels from 0 to 1; or
            None to measure them. ``fit`` replaces them.
        layout: ``"n c *"``, ``"n * c"`` for channels last, or ``"c *"`` for one image. Default: ``"n c *"``.
        maximum: the largest pixel value. Default: 255 for uint8, else 1.
        dtype: dtype of the statistics. Default: float64.

    Shape: The layout's axes; the output has the same shape; uint8 becomes torch's default dtype.

    Raises:
        OptionError: an unknown name or layout, or invalid numbers.
        ProtocolError: ``partial_fit`` after given constants, whose number of pixels is not known.

    Reference: Krizhevsky, Sutskever, Hinton (2012), https://doi.org/10.1145/3065386, section 2.

    >>> white = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    >>> ImageStandardization("mnist")(white)
    tensor([[[[2.8215]]]])
    """

    shown = "layout={0.layout!r}, maximum={0.maximum}"
    statistics = ("mean", "var")
    mean: Tensor
    var: Tensor

    def __init__(
        self,
        statistics: str | Constants | None = "imagenet",
        *,
        layout: str = "n c *",
        maximum: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if layout not in _SUPPORTS:
            raise OptionError(f"ImageStandardization: layout={layout!r}; wanted {', '.join(map(repr, _SUPPORTS))}")
        if maximum is not None and not maximum > 0:
            raise OptionError(f"ImageStandardization: maximum={maximum}; wanted a number above 0, such as 255, or None")
        super().__init__(_SUPPORTS[layout], device=device, dtype=dtype)
        self.layout, self.maximum = layout, maximum
        if statistics is not None:
            mean, std = _constants(statistics)
            mean, std = torch.tensor([mean, std], dtype=torch.float64)
            self._store(0, {"mean": mean, "var": std.square()})

    def partial_fit(self, batch: Tensor | tuple[Any, ...] | list[Any]) -> Self:
        if self.fitted and not int(self.count):
            raise ProtocolError(
                "ImageStandardization.partial_fit: these constants were given, and their number of pixels is not known; "
                "start from ImageStandardization(None), or replace them with fit"
            )
        return super().partial_fit(batch)

    def prepare(self, x: Tensor) -> Tensor:
        maximum = self.maximum
        if x.dtype == torch.uint8:
            x, maximum = x.to(torch.get_default_dtype()), maximum or 255.0
        x = super().prepare(x)
        return x / maximum if maximum not in (None, 1) else x

    def center(self) -> Tensor:
        return self.mean

    def scale(self) -> Tensor:
        return deviation(self.mean, self.var, self.count)

    def inverse_transform(self, y: Tensor) -> Tensor:
        """Undo ``transform``: floating pixels from 0 to ``maximum``, or to 1 if none was given."""
        return super().inverse_transform(y) * (self.maximum or 1.0)


def image_standardization(
    input: Tensor,
    statistics: str | Constants | None = "imagenet",
    *,
    layout: str = "n c *",
    maximum: float | None = None,
) -> Tensor:
    """Standardize images by published or given constants, or with None by their own; see ImageStandardization.

    >>> image_standardization(torch.tensor([[[0.0, 0.5]]]), ((0.5,), (0.25,)))
    tensor([[[-2.,  0.]]])
    """
    module = ImageStandardization(statistics, layout=layout, maximum=maximum, **like(input))
    return (module.fit(input) if statistics is None else module)(input)


def _constants(statistics: str | Constants) -> tuple[list[float], list[float]]:
    if isinstance(statistics, str):
        if statistics.lower() not in PUBLISHED:
            raise OptionError(
                f"ImageStandardization: no published constants {statistics!r}; there are {', '.join(PUBLISHED)}; "
                "or give (means, deviations), or None and fit"
            )
        statistics = PUBLISHED[statistics.lower()]
    try:
        mean, std = ([float(value) for value in values] for values in statistics)
    except (TypeError, ValueError):
        raise OptionError(
            f"ImageStandardization: statistics={statistics!r}; wanted a name, or (means, deviations) with one number per channel"
        ) from None
    if len(mean) != len(std) or not mean:
        raise ShapeError(
            f"ImageStandardization: {len(mean)} means and {len(std)} deviations; wanted one of each per channel"
        )
    if not all(value > 0 for value in std):
        raise OptionError(f"ImageStandardization: deviations {std}; wanted numbers above 0")
    return mean, std


CARD = Card(
    title="Image standardization",
    kind="input",
    normalized_over="each channel, over the images and positions of a data set",
    formula="y = (x / maximum - mean_c) / std_c",
    paper=paper("krizhevsky2012imagenet"),
    use_cases="image classifiers; all that was pretrained on ImageNet",
    strengths="shared constants, to which pretrained weights are adapted",
    weaknesses="the constants of another data set do not standardize yours",
    module=ImageStandardization,
    functional=image_standardization,
    make=lambda features: ImageStandardization(None),
    streams=True,
)
