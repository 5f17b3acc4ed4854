"""Solids in [-1, 1]^3, some by formula: points in them and about their surface, and how well a guess of their inside is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from normkit.lab.data.mesh import mesh

_STEPS = 12  # of Newton's method towards the surface
_CLOSE = 1e-4
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


@dataclass(frozen=True)
class Shape:
    """A solid within [-1, 1]^3 where a function is below zero."""

    name: str
    value: Callable[[Tensor], Tensor]  # (n, 3) to (n,)
    volume: float | None = None

    def inside(self, points: Tensor) -> Tensor:
        """Says which points are in the body."""
        return self.value(points) < 0

    def surface(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws points on the surface: random ones, moved along the gradient onto it; not evenly by area."""
        found: list[Tensor] = []
        while sum(map(len, found)) < count:
            points = (2 * torch.rand(4 * count + 64, 3, generator=generator) - 1).double()
            for _ in range(_STEPS):
                points = points.detach().requires_grad_()
                value = self.value(points)
                (slope,) = torch.autograd.grad(value.sum(), points)
                points = points - (value / slope.square().sum(1).clamp_min(1e-9))[:, None] * slope
            points = points.detach()
            good = (self.value(points).abs() < _CLOSE) & (points.abs() <= 1).all(1)
            found.append(points[good].float())
        return torch.cat(found)[:count]


def torus(ring: float = 0.6, tube: float = 0.25) -> Shape:
    """A torus about z of ring R and tube r; its volume is 2 pi^2 R r^2."""

    def value(p: Tensor) -> Tensor:
        return torch.hypot(torch.hypot(p[:, 0], p[:, 1]) - ring, p[:, 2]) - tube

    return Shape("torus", value, 2 * math.pi**2 * ring * tube**2)


def gyroid(waves: float = 7.0, thickness: float = 0.35, radius: float = 0.9) -> Shape:
    """A sheet about the gyroid, sin x cos y + sin y cos z + sin z cos x = 0, of `waves` times the coordinates, within a ball."""

    def value(p: Tensor) -> Tensor:
        x, y, z = (waves * p).unbind(1)
        sheet = (x.sin() * y.cos() + y.sin() * z.cos() + z.sin() * x.cos()).abs() - thickness
        return torch.maximum(sheet / waves, p.norm(dim=1) - radius)

    return Shape("gyroid", value)


def csg(box: float = 0.65, ball: float = 0.85, bore: float = 0.35) -> Shape:
    """A cube rounded by a ball, with a bore along each axis: constructive solid geometry by minimum and maximum."""

    def value(p: Tensor) -> Tensor:
        x, y, z = p.unbind(1)
        body = torch.maximum(p.abs().amax(1) - box, p.norm(dim=1) - ball)
        nearest = torch.minimum(torch.minimum(torch.hypot(x, y), torch.hypot(y, z)), torch.hypot(z, x))
        return torch.maximum(body, bore - nearest)

    return Shape("csg", value)


SHAPES = {shape.name: shape for shape in (torus(), gyroid(), csg())}


def find_solid(name: str, root: Path | None = None) -> Solid:
    """Finds a solid by name: an analytic shape, or a mesh of the folder ``meshes``, by its file without ending."""
    return SHAPES[name] if name in SHAPES else mesh(name, root)


def draw_points(solid: Solid, count: int, seed: int, near: float = 0.5) -> tuple[Tensor, Tensor]:
    """Draws points, some about the surface and the others anywhere in [-1, 1]^3, in random order.

        near the surface: p = s + n,   s on the surface, n ~ N(0, SPREAD^2) in each coordinate

    Gives points ``(count, 3)`` and whether each is inside.
    """
    generator = torch.Generator().manual_seed(seed)
    close = round(near * count)
    about = solid.surface(close, generator) if close else torch.zeros(0, 3)
    about = (about + SPREAD * torch.randn(close, 3, generator=generator)).clamp(-1, 1)
    anywhere = 2 * torch.rand(count - close, 3, generator=generator) - 1
    points = torch.cat([about, anywhere])[torch.randperm(count, generator=generator)]
    return points, solid.inside(points)


def iou(guess: Tensor, truth: Tensor) -> float:
    """Intersection over union of two sets of points; 1 when both are empty."""
    union = int((guess | truth).sum())
    return int((guess & truth).sum()) / union if union else 1.0
