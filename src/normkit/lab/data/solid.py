"""Solids in [-1, 1]^3: points in them and about their surface, and how well a guess of their inside is."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

SPREAD = 0.01  # standard deviation of points about the surface


class Solid(Protocol):
    """A body that knows its inside and its surface."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def inside(self, points: Tensor) -> Tensor:
        """Says which points ``(n, 3)`` are in the body: ``(n,)`` of bool."""
        ...

    def surface(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws points ``(count, 3)`` on the surface."""
        ...


def find_solid(name: str, root: Path | None = None) -> Solid:
    """Finds a solid by name: an analytic shape, or a mesh of the folder ``meshes``, by its file without ending."""
    from normkit.lab.data.mesh import mesh
    from normkit.lab.data.shapes import SHAPES

    return SHAPES[name] if name in SHAPES else mesh(name, root)


def draw_points(
    solid: Solid, count: int, seed: int, near: float = 0.5, spread: float = SPREAD
) -> tuple[Tensor, Tensor]:
    """Draws points, some about the surface and the others anywhere in [-1, 1]^3, in random order.

        near the surface: p = s + n,   s on the surface, n ~ N(0, spread^2) in each coordinate

    Gives points ``(count, 3)`` and whether each is inside.
    """
    generator = torch.Generator().manual_seed(seed)
    close = round(near * count)
    about = solid.surface(close, generator) if close else torch.zeros(0, 3)
    about = (about + spread * torch.randn(close, 3, generator=generator)).clamp(-1, 1)
    anywhere = 2 * torch.rand(count - close, 3, generator=generator) - 1
    points = torch.cat([about, anywhere])[torch.randperm(count, generator=generator)]
    return points, solid.inside(points)


def iou(guess: Tensor, truth: Tensor) -> float:
    """Intersection over union of two sets of points; 1 when both are empty.

    >>> iou(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    0.5
    """
    union = int((guess | truth).sum())
    return int((guess & truth).sum()) / union if union else 1.0
