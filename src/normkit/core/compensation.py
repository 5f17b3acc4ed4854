"""Compensation: the weight and bias applied after normalizing, and the axes along which they vary."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from normkit.core.errors import ShapeError
from normkit.core.support import Split, place, show


@dataclass(frozen=True)
class Affine:
    """y = (offset + weight) * normalized + bias, with one weight and bias per element of the axes ``per``.

    Args:
        per: axes in the notation of Support: ``"c"`` per channel, ``"(g c)"`` the same where channels are split into groups,
            ``"d"`` per feature, ``""`` one scalar, ``"n c"`` per sample and channel (computed from another input).
        offset: added to the weight; 1 where the weight holds the difference of the gain from 1, and starts at 0.

    >>> from normkit.core.support import Support
    >>> split = Support("n c *", over="n *").split((2, 3, 4))
    >>> Affine("c").apply(torch.ones(2, 3, 4), split, weight=torch.tensor([1.0, 2.0, 3.0]), bias=None)[0, :, 0]
    tensor([1., 2., 3.])
    """

    per: str
    offset: float = 0.0

    def apply(self, normalized: Tensor, split: Split, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Scale and shift a normalized tensor of the split's shape; None skips that step."""
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


def modulation(layout: str, shape: Sequence[int], *parts: Tensor) -> tuple[str, list[Tensor]]:
    """Reduce scales and shifts computed from another input to the fewest axes that hold them all: those, and the parts.

    A part is (C,), (N or 1, C), or has as many axes as the input, over which it broadcasts.

    >>> per, (scale, shift) = modulation("n * d", (2, 3, 4), torch.ones(2, 1, 4), torch.zeros(4))
    >>> per, scale.shape, shift.shape
    ('n d', torch.Size([2, 4]), torch.Size([2, 4]))
    """
    channel, name = _channel(layout, shape)
    if all(len(shape) > 1 and part.shape == (shape[0], shape[channel]) for part in parts):
        return f"n {name}", list(parts)
    aligned = [align(layout, shape, part) for part in parts]
    varies = {d for part in aligned for d, size in enumerate(part.shape) if size != 1}
    if not varies <= {0, channel}:
        return layout, [part.expand(*shape) for part in aligned]
    axes = [0, channel] if 0 in varies else [channel]
    wanted = [size if d in axes else 1 for d, size in enumerate(shape)]
    fewest = [part.expand(wanted).reshape([shape[d] for d in axes]) for part in aligned]
    return ("n " if 0 in varies else "") + name, fewest


def align(layout: str, shape: Sequence[int], part: Tensor) -> Tensor:
    """View a part of ``modulation`` with as many axes as the input."""
    rank, (channel, _) = len(shape), _channel(layout, shape)
    places = {0: (), 1: (channel,), 2: (0, channel), rank: tuple(range(rank))}.get(part.dim())
    # Not "in (1, size)": a compiler would take two symbolic sizes for different there, and not guard on their equality.
    unlike = places is None or any(part.shape[k] != 1 and part.shape[k] != shape[d] for k, d in enumerate(places))
    if rank < 2 or places is None or unlike:
        raise ShapeError(
            f"a scale or shift of {show(part.shape)} does not broadcast over an input of {show(shape)} ({layout}); wanted "
            "one value per channel, per sample and channel, or as many axes as the input has, each of its size or 1"
        )
    sizes = [1] * rank
    for k, d in enumerate(places):
        sizes[d] = part.shape[k]
    return part.reshape(sizes)


def _channel(layout: str, shape: Sequence[int]) -> tuple[int, str]:
    names = layout.split()
    return (1, names[1]) if names[-1] == "*" else (len(shape) - 1, names[-1])


def per_sample(condition: Tensor) -> Tensor:
    """Bring a condition to shape (N or 1, size), from (size,) or from a shape with axes of size 1 in between."""
    if condition.dim() == 1:
        return condition.unsqueeze(0)
    between = condition.dim() > 2 and all(size == 1 for size in condition.shape[1:-1])
    return condition.flatten(0, -2) if between else condition
