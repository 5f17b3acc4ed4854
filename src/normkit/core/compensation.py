"""Compensation: what is multiplied and added after normalizing, and per which axes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normkit.core.support import Split, place


@dataclass(frozen=True)
class Affine:
    """y = (offset + weight) * normalized + bias, with one weight and bias per element of the axes ``per``.

    Args:
        per: axes in the notation of Support: ``"c"`` per channel, ``"(g c)"`` the same where channels are split into groups,
            ``"d"`` per feature, ``""`` one scalar, ``"n c"`` per sample and channel (a compensation that is computed from
            another input).
        offset: added to the weight: 1 for gains that are kept as differences from 1, and start at 0.

    >>> import torch
    >>> from normkit.core.support import Support
    >>> split = Support("n c *", over="n *").split((2, 3, 4))
    >>> Affine("c").apply(torch.ones(2, 3, 4), split, weight=torch.tensor([1.0, 2.0, 3.0]), bias=None)[0, :, 0]
    tensor([1., 2., 3.])
    """

    per: str
    offset: float = 0.0

    def apply(self, normalized: Tensor, split: Split, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Scale and shift a normalized tensor of the split's shape; None leaves that step out."""
        if weight is not None:
            gain = place(weight, self.per, split).to(normalized.dtype)
            normalized = normalized * (gain + self.offset if self.offset else gain)
        if bias is not None:
            normalized = normalized + place(bias, self.per, split).to(normalized.dtype)
        return normalized

    def formula(self, normalized: str) -> str:
        """The compensated value as text."""
        gain = f"({self.offset:g} + weight)" if self.offset else "weight"
        if " - " in normalized and "/" not in normalized:
            normalized = f"({normalized})"
        return f"{gain} * {normalized} + bias"
