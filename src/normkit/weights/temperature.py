"""One learned scalar per weight."""

from typing import Any

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """The parametrization that multiplies a weight by one learned scalar, which starts at 1.

    After ``Equilibrate`` it restores the length that unit rows remove from a last layer: how peaked its logits can be.

    >>> Temperature()(torch.ones(2)).detach()
    tensor([1., 1.])
    """

    def __init__(self, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The scaled weight, of the weight's dtype."""
        return (weight * self.scale).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight that the scale maps to this one; this one itself if the scale is 0."""
        return weight / torch.where(self.scale == 0, 1.0, self.scale).to(weight.dtype)
