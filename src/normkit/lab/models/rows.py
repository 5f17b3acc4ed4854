"""Two controls of row equilibration: its scale without it, and it without its scale."""

from typing import Literal

import torch
from torch import nn

from normkit.surgery.select import select
from normkit.weights.weight_conditioning import weight_conditioning

Scale = Literal["", "unit", "kept"]
_TRUNK = "re:trunk"


def scale_rows(model: nn.Module, scale: Scale) -> None:
    """Changes the layers of a model's trunks, in place, before it is trained.

    ==========  ==================================================================================================
    ``""``      nothing
    ``"unit"``  the rows of the weights are divided by their norms, once: the E form's first signals, no conditioning
    ``"kept"``  E with a gain, W = g E A, g the root mean square of the row norms of A as it stands: conditioning
                that leaves the first signals about as large as they were
    ==========  ==================================================================================================
    """
    for layer in select(model, _TRUNK).values() if scale else ():
        weight = layer.get_parameter("weight")
        if scale == "kept":
            lengths = weight.detach().norm(dim=1)
            weight_conditioning(layer, gain=float(lengths.square().mean().sqrt()))
        else:
            unit_rows(weight)


@torch.no_grad()
def unit_rows(weight: torch.Tensor) -> None:
    """Divides each row of a weight by its norm, in place."""
    weight /= weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
