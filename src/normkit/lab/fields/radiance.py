"""One run of a NeRF on one scene: training, pictures of the held-out views, and what was measured on the way."""

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

from normkit.diagnostics.conditioning import weight_conditions
from normkit.lab.data.blender import blender
from normkit.lab.data.llff import SCENES, llff
from normkit.lab.data.scene import Rays, Scene
from normkit.lab.data.spheres import spheres
from normkit.lab.fields.rendering import Sampling, psnr, render, render_view
from normkit.lab.models.nerf import NeRF, nerf
from normkit.lab.models.rows import Scale, scale_rows
from normkit.lab.record import write_bytes
from normkit.lab.seeding import reseed
from normkit.lab.sweep import Work
from normkit.lab.train.cost import RATE, Costs, Step, measure_steps
from normkit.lab.train.walk import OK, Diverged, descend, device, walk

VIEWS = 3  # held-out views that judge, as in the paper
_PROBE = 2048  # pixels, of training views and of those that judge, that are measured along training
_FALL = 0.1**0.8  # of the learning rate over a run: 0.1 each 250,000 steps, 200,000 steps


@dataclass(frozen=True)
class RadianceJob(Work, path="{0.subject}/{0.row}/rate={0.rate:g}/seed={0.seed}"):
    """What to train, and how: a scene by name, a row's name and recipe, and the scale of the trunks' rows.

    The rest are the published settings: `reduce` averages squares of that many pixels per side, `rays` are per step, `epochs`
    over the training pixels stand in the place of `steps`, `every` steps lie between measurements.
    """

    scene: str
    row: str
    recipe: str
    seed: int
    scale: Scale = ""
    width: int = 256
    depth: int = 8
    reduce: int = 1
    rays: int = 1024
    coarse: int = 64
    fine: int = 64
    steps: int = 200_000
    epochs: int | None = None
    rate: float = 5e-4
    every: int = 10_000

    @property
    def subject(self) -> str:
        return self.scene


def find_scene(name: str, reduce: int = 1) -> Scene:
    """Reads a scene from the folder in ``NORMKIT_DATA``; balls need no data; `reduce` is the side of the squares to average."""
    if name == "spheres":
        return spheres(max(8, 96 // reduce))
    return llff(scene=name, reduce=reduce) if name in SCENES else blender(scene=name, reduce=2 * reduce)


def learn_scene(job: RadianceJob, folder: Path) -> dict[str, Any]:
    """Trains a NeRF, renders the held-out views into ``folder/views``, and resumes from a checkpoint if there is one.

    The loss is the mean squared error of the colours of the coarse and of the fine field, summed. ``psnr`` is of each whole view
    in dB, None where it diverged; the curve is of 2,048 pixels of the training views and of those that judge.
    """
    scene, here = find_scene(job.scene, job.reduce), device()
    model = _begin(job, here)
    rays, colours = scene.rays(scene.train).to(here), scene.colours(scene.train).to(here)
    steps = job.steps if job.epochs is None else math.ceil(job.epochs * len(rays) / job.rays)
    sampling = Sampling(job.coarse, job.fine)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.rate)
    views = _spread(scene.test, VIEWS)
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
    """Averages the condition numbers of the trunks' weights, raw and effective, geometrically.

    >>> from normkit.lab.models.nerf import nerf
    >>> found = trunk_conditions(nerf("none+e@re:trunk", width=8, depth=2))
    >>> sorted(found)
    ['condition', 'raw_condition']
    """
    pairs = [pair for name, pair in weight_conditions(model).items() if "trunk" in name]
    raw, effective = (math.exp(sum(math.log(pair[k]) for pair in pairs) / len(pairs)) for k in (0, 1))
    return {"raw_condition": raw, "condition": effective}


def decode(picture: str) -> np.ndarray:
    """Gives the pixels of a picture of a result, from 0 to 1."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as file:
        return np.asarray(file, dtype=np.float64) / 255


def encode(pixels: np.ndarray) -> str:
    """Packs pixels from 0 to 1 into text, so that a result holds its pictures.

    Args:
        pixels: ``(height, width, 3)`` or ``(height, width)``.
    """
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
    if not torch.isfinite(loss):
        raise Diverged
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


def _spread(views: tuple[int, ...], count: int) -> tuple[int, ...]:
    if len(views) <= count:
        return views
    return tuple(views[round(place * (len(views) - 1) / (count - 1))] for place in range(count))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(np.nan_to_num(pixels), 0, 1) * 255 + 0.5).astype(np.uint8))
