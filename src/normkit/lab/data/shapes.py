"""Solids given by a formula, for when there is no mesh at hand and for tests against closed forms."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 12  # of Newton's method towards the surface
_CLOSE = 1e-4


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
    """A torus about z of ring R and tube r; its volume is 2 pi^2 R r^2.

    >>> torus().inside(torch.tensor([[0.6, 0.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
    [True, False]
    """

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
