"""A scene of luminous balls whose pictures are known in closed form, so that no photographs are needed."""

import math

import torch
from torch import Tensor

from normkit.lab.data.scene import Rays, Scene

# x, y, z, radius, density, red, green, blue; no two meet.
_BALLS = torch.tensor(
    [
        [0.00, -0.05, 0.00, 0.55, 8.0, 0.85, 0.25, 0.20],
        [0.85, 0.10, 0.15, 0.28, 12.0, 0.20, 0.45, 0.85],
        [-0.80, -0.10, 0.35, 0.32, 12.0, 0.25, 0.70, 0.35],
        [0.10, 0.75, -0.20, 0.22, 16.0, 0.95, 0.80, 0.25],
        [-0.30, -0.15, -0.95, 0.30, 3.0, 0.55, 0.30, 0.75],
        [0.40, -0.45, 0.80, 0.20, 16.0, 0.95, 0.55, 0.15],
    ]
)


def spheres(size: int = 32, views: int = 24, hold: int = 8) -> Scene:
    """Six balls of even density on white, seen from cameras on a spiral about them; one of `hold` views is held out."""
    poses = torch.stack([_pose(view, views) for view in range(views)])
    test = tuple(range(0, views, hold))
    blank = Scene(
        name="spheres",
        images=torch.zeros(views, size, size, 3),
        poses=poses,
        focal=(1.3 * size, 1.3 * size),
        train=tuple(view for view in range(views) if view not in test),
        test=test,
        near=2.0,
        far=6.0,
        background=1.0,
    )
    colours = see(blank.rays(tuple(range(views))))
    return Scene(**{**vars(blank), "images": colours.reshape(views, size, size, 3)})


def see(rays: Rays, balls: Tensor = _BALLS) -> Tensor:
    """Computes what rays see of balls that do not meet, exactly.

        colour = sum_k T_k (1 - exp(-s_k l_k)) c_k + T background,   T_k = exp(-sum_{j before k} s_j l_j)

    with l_k the length of the ray within ball k. Balls ``(k, 8)`` have centre, radius, density and colour; rays, not in
    NDC, begin outside of all.
    """
    centre, radius, density, colour = balls[:, :3], balls[:, 3], balls[:, 4], balls[:, 5:]
    away = centre - rays.origins[:, None]
    along = (away * rays.looks[:, None]).sum(-1)
    half = (radius.square() - away.square().sum(-1) + along.square()).clamp_min(0).sqrt()
    thickness = torch.where(along > 0, 2 * half * density, 0.0)
    order = along.argsort(dim=-1)
    thickness, colours = thickness.gather(1, order), colour[order]
    before = thickness.cumsum(-1) - thickness
    weights = torch.exp(-before) * -torch.expm1(-thickness)
    return (weights[..., None] * colours).sum(1) + torch.exp(-thickness.sum(-1))[:, None]


def _pose(view: int, views: int) -> Tensor:
    turn, rise = 2.4 * view, math.radians(10 + 45 * view / max(1, views - 1))  # the golden angle spreads neighbours
    back = torch.tensor([math.cos(rise) * math.sin(turn), math.sin(rise), math.cos(rise) * math.cos(turn)])
    right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), back)
    right = right / right.norm()
    return torch.stack([right, torch.linalg.cross(back, right), back, 4 * back], dim=1)
