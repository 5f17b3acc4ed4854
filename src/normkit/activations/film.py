"""Feature-wise linear modulation (FiLM): a scale and a shift per channel, computed from a condition."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.compensation import Affine, modulation, per_sample
from normkit.core.errors import ShapeError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.support import Support, show
from normkit.engine.layer import check_channels, check_layout

_SUPPORTS = {layout: Support(layout, over="*") for layout in ("n c *", "n * c")}


class FiLM(Module):
    """Scale and shift each channel by a linear function of a condition.

    y = (1 + scale) * x + shift, with (scale, shift) = Linear(condition), one of each per sample and channel. It computes no
    statistic: it is the affine part of a normalization, computed from another input, and usually follows a batch normalization
    without its own (``affine=False``).

    Args:
        channels: channels C.
        condition: size of the condition.
        zero: initialize the linear layer to zero, so that y = x; else as ``torch.nn.Linear`` does. Default: False.
        layout: ``"n c *"`` for channels first, ``"n * c"`` for channels last. Default: ``"n c *"``.

    Shape:
        input (N, C, *), or (N, *, C) with channels last, and condition (N, condition); the output has the shape and dtype of
        the input.

    Raises:
        ShapeError: the input has another number of channels, or the condition another size.
        OptionError: an unknown layout, or the input is not floating.

    Reference:
        Perez, Strub, de Vries, Dumoulin, Courville, "FiLM: Visual Reasoning with a General Conditioning Layer" (2018),
        https://arxiv.org/abs/1709.07871.

    >>> FiLM(2, condition=3, zero=True)(torch.tensor([[1.0, 3.0]]), torch.ones(1, 3)).detach()
    tensor([[1., 3.]])
    """

    shown = "{0.channels}, condition={0.condition}"
    unusual: ClassVar = {"layout": "n c *"}

    def __init__(
        self,
        channels: int,
        condition: int,
        *,
        zero: bool = False,
        layout: str = "n c *",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_layout("FiLM", layout)
        self.channels, self.condition, self.zero, self.layout = channels, condition, zero, layout
        self.linear = nn.Linear(condition, 2 * channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()
        if self.zero:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:
        """Modulate by the condition (N, condition), or one for all samples: (condition,) or (1, condition)."""
        check_channels("FiLM", input, self.channels, "channels", self.layout)
        given, condition = condition, per_sample(condition)
        if condition.shape[1:] != (self.condition,) or condition.shape[0] not in (1, input.shape[0]):
            raise ShapeError(
                f"FiLM: got a condition of {show(given.shape)} for an input of {show(input.shape)}; "
                f"wanted {show((input.shape[0], self.condition))}"
            )
        scale, shift = self.linear(condition.to(self.linear.weight.dtype)).chunk(2, -1)
        return film(input, scale, shift, layout=self.layout)


def film(input: Tensor, scale: Tensor, shift: Tensor, *, layout: str = "n c *") -> Tensor:
    """Feature-wise linear modulation as a function of a scale and a shift; see FiLM.

    Each is (N, C) or (C,), or has as many axes as the input and broadcasts over it, as (N, C, 1, 1).

    >>> film(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[2., 4.]])
    """
    check_layout("film", layout)
    wide = torch.promote_types(accumulation_dtype(input.dtype), scale.dtype)
    split = _SUPPORTS[layout].split(input.shape)
    per, (scale, shift) = modulation(layout, input.shape, scale, shift)
    return Affine(per, offset=1.0).apply(input.to(wide), split, scale, shift).to(input.dtype)


def _example_condition(x: Tensor) -> tuple[Tensor]:
    return (x.double().flatten(2).mean(2).to(x.dtype),)


CARD = Card(
    title="Feature-wise linear modulation (FiLM)",
    wordless="it takes a condition as well as its input",
    normalized_over="nothing; each sample's channels are scaled and shifted by a function of a condition",
    formula="y = (1 + scale(condition)) * x + shift(condition)",
    paper=Paper(
        "Perez, Ethan and Strub, Florian and de Vries, Harm and Dumoulin, Vincent and Courville, Aaron",
        "FiLM: Visual Reasoning with a General Conditioning Layer",
        2018,
        "https://arxiv.org/abs/1709.07871",
    ),
    use_cases="convolutional networks steered by a question, class or style; after a norm without weight and bias",
    strengths="two numbers per channel steer a whole network; works after any norm",
    weaknesses="normalizes nothing itself; the same for all positions",
    module=FiLM,
    functional=film,
    make=lambda channels: FiLM(channels, channels),
    extra=_example_condition,
)
