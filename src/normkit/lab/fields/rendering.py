"""Volume rendering: pictures from a field of colours and densities, along rays."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.data.scene import Rays
from normkit.lab.models.nerf import NeRF

_FAR_AWAY = 1e10  # the last sample stands for all that lies behind it
_FLOOR = 1e-5  # added to every weight, so that no part of a ray is never looked at


@dataclass(frozen=True)
class Sampling:
    """How many samples a ray has, evenly spread and on top where there is matter, and the noise of densities in training."""

    coarse: int = 64
    fine: int = 64
    noise: float = 1.0


@dataclass(frozen=True)
class Shade:
    """What is seen along n rays: colours, means of `t` by the samples' weights, sums of the weights, and the weights."""

    colour: Tensor
    depth: Tensor
    opacity: Tensor
    weights: Tensor


def even_depths(rays: Rays, samples: int, *, jitter: bool = False) -> Tensor:
    """Cuts every ray into intervals of one length, and takes the middle, or with `jitter` a random point, of each."""
    shape, device = (len(rays), samples), rays.origins.device
    inside = torch.rand(shape, device=device) if jitter else torch.full(shape, 0.5, device=device)
    return rays.near + (rays.far - rays.near) / samples * (torch.arange(samples, device=device) + inside)


def weighted_depths(depths: Tensor, weights: Tensor, samples: int, *, jitter: bool = False) -> Tensor:
    """Draws depths ``(n, samples)`` from the density that is constant between the middles of `depths`, by their weights (n, m).

        t = F^-1(u),   F the running sum of w_i + 1e-5 for all but the first and the last sample, over their total

    u is at the middles of equal parts, or with `jitter` random and uniform, which leaves what is drawn unordered.

    Reference: Mildenhall et al. 2020, NeRF, section 5.2, https://arxiv.org/abs/2003.08934
    """
    edges = 0.5 * (depths[:, 1:] + depths[:, :-1])
    parts = weights[:, 1:-1] + _FLOOR
    sums = functional.pad((parts / parts.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    shape = (len(depths), samples)
    if jitter:
        u = torch.rand(shape, device=depths.device)
    else:
        u = ((torch.arange(samples, device=depths.device) + 0.5) / samples).expand(shape).contiguous()
    above = torch.searchsorted(sums, u, right=True).clamp(1, sums.shape[1] - 1)
    low, high = sums.gather(1, above - 1), sums.gather(1, above)
    left, right = edges.gather(1, above - 1), edges.gather(1, above)
    # Rounding may put u past the last sum; never past the last edge.
    return left + ((u - low) / (high - low)).clamp(0, 1) * (right - left)


def composite(
    colour: Tensor, density: Tensor, depths: Tensor, lengths: Tensor, background: float = 0.0, noise: float = 0.0
) -> Shade:
    """Adds up what samples along rays send, each dimmed by those before it.

        w_i = exp(-sum_{j<i} s_j d_j) (1 - exp(-s_i d_i)),   colour = sum_i w_i c_i + (1 - sum_i w_i) background

    with s_i the positive part of the raw density and d_i the distance to the next sample; beyond the last one lies nothing
    but itself. `lengths` of the rays' directions make distances of ascending depths; `noise` is added to raw densities.

    Reference: Max 1995, Optical models for direct volume rendering, https://doi.org/10.1109/2945.468400
    """
    if noise:
        density = density + noise * torch.randn_like(density)
    gaps = functional.pad(depths[:, 1:] - depths[:, :-1], (0, 1), value=_FAR_AWAY) * lengths[:, None]
    thickness = functional.relu(density) * gaps
    before = functional.pad(thickness[:, :-1].cumsum(-1), (1, 0))
    weights = torch.exp(-before) * -torch.expm1(-thickness)
    opacity = weights.sum(-1)
    seen = (weights[..., None] * colour).sum(-2) + (1 - opacity)[:, None] * background
    return Shade(seen, (weights * depths).sum(-1), opacity, weights)


def look_along(field: nn.Module, rays: Rays, depths: Tensor, background: float = 0.0, noise: float = 0.0) -> Shade:
    """Renders rays with ``field(points, directions) -> (colours, raw densities)`` asked at given depths."""
    points = rays.origins[:, None] + depths[..., None] * rays.directions[:, None]
    looks = rays.looks[:, None].expand_as(points)
    colour, density = field(points.reshape(-1, 3), looks.reshape(-1, 3))
    shape = depths.shape
    lengths = rays.directions.norm(dim=-1)
    return composite(colour.view(*shape, 3), density.view(shape), depths, lengths, background, noise)


def render(
    model: NeRF, rays: Rays, sampling: Sampling, background: float = 0.0, *, training: bool = False
) -> tuple[Shade, Shade]:
    """Renders rays twice: evenly sampled by the coarse field, and by the fine field at those depths and more."""
    noise = sampling.noise if training else 0.0
    depths = even_depths(rays, sampling.coarse, jitter=training)
    coarse = look_along(model.coarse, rays, depths, background, noise)
    # Where to look is no differentiable choice: the coarse field learns from its own picture.
    more = weighted_depths(depths, coarse.weights.detach(), sampling.fine, jitter=training)
    every = torch.cat([depths, more], dim=-1).sort(dim=-1).values
    return coarse, look_along(model.fine, rays, every, background, noise)


@torch.no_grad()
def render_view(
    model: NeRF, rays: Rays, sampling: Sampling, background: float = 0.0, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """Renders all rays of a picture, `chunk` at a time, in eval mode: colours (n, 3) and depths (n,) of the fine field."""
    training = model.training
    model.eval()
    try:
        parts = [
            render(model, rays.take(slice(begin, begin + chunk)), sampling, background)[1]
            for begin in range(0, len(rays), chunk)
        ]
    finally:
        model.train(training)
    return torch.cat([part.colour for part in parts]), torch.cat([part.depth for part in parts])


def psnr(error: float) -> float:
    """Turns a mean squared error of colours from 0 to 1 into decibels, -10 log10(error)."""
    import math

    return -10 * math.log10(max(error, 1e-12))
