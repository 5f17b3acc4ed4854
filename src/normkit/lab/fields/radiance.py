"""One run of a NeRF on one scene: volume rendering along rays, training, and pictures of the held-out views."""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from normkit.diagnostics.conditioning import weight_conditions
from normkit.lab.data.scene import Rays, Scene, llff, spheres
from normkit.lab.models.nerf import NeRF, nerf
from normkit.lab.models.rows import Scale, scale_rows
from normkit.lab.record import write_bytes
from normkit.lab.seeding import reseed
from normkit.lab.sweep import Work
from normkit.lab.train.cost import RATE, Costs, Step, measure_steps
from normkit.lab.train.images import OK, descend, device, walk

_FAR_AWAY = 1e10  # the last sample stands for all that lies behind it
_FLOOR = 1e-5  # added to every weight, so that no part of a ray is never looked at
VIEWS = 3  # held-out views that judge, as in the paper
_PROBE = 2048  # pixels, of training views and of those that judge, that are measured along training
_FALL = 0.1**0.8  # of the learning rate over a run: 0.1 each 250,000 steps, 200,000 steps


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


@dataclass(frozen=True)
class RadianceJob(Work, path="{0.subject}/{0.row}/rate={0.rate:g}/seed={0.seed}"):
    """What to train, and how: a scene, a row's name and recipe, the scale of its trunks, and the published settings."""

    scene: str
    row: str
    recipe: str
    seed: int
    scale: Scale = ""
    width: int = 256
    depth: int = 8
    reduce: int = 1  # pixels per side of the squares that are averaged
    rays: int = 1024  # per step
    coarse: int = 64
    fine: int = 64
    steps: int = 200_000
    epochs: int | None = None  # over the training pixels, in place of steps
    rate: float = 5e-4
    every: int = 10_000  # steps between measurements

    @property
    def subject(self) -> str:
        return self.scene


def find_scene(name: str, reduce: int = 1) -> Scene:
    """Reads a scene from the folder in ``NORMKIT_DATA``; balls need no data; `reduce` is the side of the squares to average."""
    return spheres(max(8, 96 // reduce)) if name == "spheres" else llff(scene=name, reduce=reduce)


def learn_scene(job: RadianceJob, folder: Path) -> dict[str, Any]:
    """Trains a NeRF, and renders the held-out views into ``folder/views``; ``psnr`` is of each in dB, None where it diverged."""
    scene, here = find_scene(job.scene, job.reduce), device()
    model = _begin(job, here)
    rays, colours = scene.rays(scene.train).to(here), scene.colours(scene.train).to(here)
    steps = job.steps if job.epochs is None else math.ceil(job.epochs * len(rays) / job.rays)
    sampling = Sampling(job.coarse, job.fine)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.rate)
    views = tuple(
        scene.test[round(place)] for place in np.linspace(0, len(scene.test) - 1, min(VIEWS, len(scene.test)))
    )
    probes = {"train_psnr": _probe(scene, scene.train, here), "test_psnr": _probe(scene, views, here)}

    def step(number: int) -> dict[str, Any] | None:
        for group in optimizer.param_groups:
            group["lr"] = job.rate * _FALL ** ((number - 1) / steps)
        chosen = torch.randint(len(rays), (job.rays,)).to(here)
        _descend(model, optimizer, rays.take(chosen), colours[chosen], sampling, scene.background)
        if number % job.every and number != steps:
            return None
        scores = {
            name: psnr(_error(render_view(model, some, sampling, scene.background)[0], wanted))
            for name, (some, wanted) in probes.items()
        }
        return {"rate": optimizer.param_groups[0]["lr"], **scores, **trunk_conditions(model)}

    done = walk(folder, steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    scores, pictures = _judge(model, scene, views, sampling, folder / "views")
    return {
        "status": done.status,
        "steps": done.steps,
        "pixels": len(rays),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "views": list(views),
        "curve": done.rows,
        "psnr": scores if done.status == OK else None,
        "pictures": pictures,
    }


def measure_scene(job: Costs[RadianceJob], folder: Path) -> dict[str, Any]:
    """Measures a training step of every row, side by side, on rays of one training view."""
    here, first = device(), job.rows[0]
    scene = find_scene(first.scene, first.reduce)
    chosen = torch.arange(first.rays) % math.prod(scene.size)
    rays, colours = scene.rays(scene.train[:1]).take(chosen).to(here), scene.colours(scene.train[:1])[chosen].to(here)
    steps = {}
    for row in job.rows:
        model = _begin(row, here)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        sampling = Sampling(row.coarse, row.fine)
        take = partial(_descend, model, optimizer, rays, colours, sampling, scene.background)
        steps[row.row] = Step(take, model)
    return measure_steps(steps, here, job.budget)


def trunk_conditions(model: nn.Module) -> dict[str, float]:
    """Averages the condition numbers of the trunks' weights, raw and effective, geometrically."""
    pairs = [pair for name, pair in weight_conditions(model).items() if "trunk" in name]
    raw, effective = (math.exp(sum(math.log(pair[k]) for pair in pairs) / len(pairs)) for k in (0, 1))
    return {"raw_condition": raw, "condition": effective}


def decode(picture: str) -> np.ndarray:
    """Gives the pixels of a picture of a result, from 0 to 1."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as file:
        return np.asarray(file, dtype=np.float64) / 255


def encode(pixels: np.ndarray) -> str:
    """Packs pixels from 0 to 1 into text, so that a result holds its pictures."""
    image = _image(pixels)
    buffer = io.BytesIO()
    image.thumbnail((504, 504))
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()


def _begin(job: RadianceJob, here: torch.device) -> NeRF:
    reseed(job.seed, "init")
    model = nerf(job.recipe, width=job.width, depth=job.depth, skip=job.depth // 2)
    scale_rows(model, job.scale)
    return model.to(here)


def _descend(
    model: NeRF, optimizer: torch.optim.Optimizer, rays: Rays, colours: Tensor, sampling: Sampling, background: float
) -> None:
    shades = render(model, rays, sampling, background, training=True)
    loss = sum((shade.colour - colours).square().mean() for shade in shades)
    assert isinstance(loss, Tensor)
    descend(optimizer, loss)


def _probe(scene: Scene, views: tuple[int, ...], here: torch.device) -> tuple[Rays, Tensor]:
    rays, colours = scene.rays(views), scene.colours(views)
    index = torch.linspace(0, len(rays) - 1, min(_PROBE, len(rays))).long()
    return rays.take(index).to(here), colours[index].to(here)


def _judge(
    model: NeRF, scene: Scene, views: tuple[int, ...], sampling: Sampling, folder: Path
) -> tuple[list[float], Mapping[str, str]]:
    scores: list[float] = []
    kept: dict[str, str] = {}
    for place, view in enumerate(views):
        colour, depth = _show(model, scene, view, sampling)
        scores.append(psnr(_error(colour, scene.images[view])))
        near = 1 - (depth - scene.near) / (scene.far - scene.near)
        pictures = {"truth": scene.images[view], "colour": colour, "depth": near.clamp(0, 1)}
        for name, pixels in pictures.items():
            buffer = io.BytesIO()
            _image(pixels.numpy()).save(buffer, "PNG")
            write_bytes(folder / f"{view:03d}-{name}.png", buffer.getvalue())
        if place == len(views) // 2:
            kept = {name: encode(pixels.numpy()) for name, pixels in pictures.items()}
    return scores, kept


def _show(model: NeRF, scene: Scene, view: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
    here = next(model.parameters()).device
    colour, depth = render_view(model, scene.rays((view,)).to(here), sampling, scene.background)
    height, width = scene.size
    return colour.reshape(height, width, 3).cpu(), depth.reshape(height, width).cpu()


def _error(image: Tensor, wanted: Tensor) -> float:
    return float((image - wanted).square().mean())


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(np.nan_to_num(pixels), 0, 1) * 255 + 0.5).astype(np.uint8))
