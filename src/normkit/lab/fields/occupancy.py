"""One run of an occupancy field on one solid: training, the learned surface, and how well the inside is predicted."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.data.crossings import picture
from normkit.lab.data.mesh import MeshSolid, volume
from normkit.lab.data.solid import Solid, draw_points, find_solid, iou
from normkit.lab.fields.radiance import encode, trunk_conditions
from normkit.lab.models.occupancy import Kind, occupancy
from normkit.lab.models.rows import Scale, scale_rows
from normkit.lab.record import write_bytes
from normkit.lab.seeding import reseed
from normkit.lab.sweep import Work
from normkit.lab.train.cost import RATE, Costs, Step, measure_steps
from normkit.lab.train.images import Stream
from normkit.lab.train.walk import OK, Diverged, descend, device, walk

_JUDGES = 100_000  # points that judge, the same for every run
_JUDGE_SEED, _CHOOSER_SEED = 2**31, 2**31 + 1
_CHUNK = 2**16
_PICTURE = 256  # pixels per side
_SHOWN = 160  # cells per side of the surface of an analytic shape, for its picture


@dataclass(frozen=True)
class OccupancyJob(Work, path="{0.subject}/{0.row}/rate={0.rate:g}/seed={0.seed}"):
    """What to train, and how: a solid, a row's name, recipe and activation, and the scale of the trunk's rows.

    The rest are the published settings: half of the `points` lie near the surface, `batch` of them are a step, `every` epochs lie
    between measurements, and the surface is extracted on `grid` cells per side.
    """

    solid: str
    row: str
    recipe: str
    kind: Kind
    seed: int
    scale: Scale = ""
    width: int = 256
    depth: int = 4
    points: int = 1_000_000
    batch: int = 50_000
    epochs: int = 200
    rate: float = 1e-4
    every: int = 5
    grid: int = 512

    @property
    def subject(self) -> str:
        return f"{self.solid}/{self.kind}"


def learn_solid(job: OccupancyJob, folder: Path) -> dict[str, Any]:
    """Trains an occupancy field, extracts its surface to ``mesh.ply`` and ``mesh.obj``, and resumes from a checkpoint.

    The loss is binary cross-entropy of the logits; a point counts as inside at a probability above 1/2. ``iou`` is of 100,000
    points anywhere, ``iou_near`` of as many near the surface; by ``iou_held``, of 20,000 others, a rate can be chosen.
    """
    solid, here = find_solid(job.solid), device()
    model = _begin(job, here)
    points, inside = (part.to(here) for part in draw_points(solid, job.points, job.seed))
    judging = min(_JUDGES, 5 * job.points)  # of a tiny job, no more than it deserves
    judges = {
        name: [part.to(here) for part in draw_points(solid, count, seed, near)]
        for name, count, seed, near in (
            ("iou", judging, _JUDGE_SEED, 0.0),
            ("iou_near", judging, _JUDGE_SEED, 1.0),
            ("iou_held", judging // 5, _CHOOSER_SEED, 1.0),
        )
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=job.rate)
    stream = Stream((points, inside), min(job.batch, job.points), job.seed)
    steps = stream.per_epoch * job.epochs

    def step(number: int) -> dict[str, Any] | None:
        where, truth = stream(number)
        loss = _descend(model, optimizer, where, truth)
        if number % (stream.per_epoch * job.every) and number != steps:
            return None
        found = {name: iou(_logits(model, where) > 0, truth) for name, (where, truth) in judges.items()}
        return {
            "epoch": -(-number // stream.per_epoch),
            "loss": float(loss.detach()),
            **found,
            **trunk_conditions(model),
        }

    done = walk(folder, steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    vertices, faces = extract(lambda where: _logits(model, where.to(here)).cpu(), job.grid)
    true_vertices, true_faces = surface_of(solid, min(_SHOWN, 2 * job.grid))
    size = min(_PICTURE, 4 * job.grid)
    write_mesh(vertices, faces, folder)
    fine = done.status == OK and bool(done.rows)
    return {
        "status": done.status,
        "steps": done.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": done.rows,
        "iou": done.rows[-1]["iou"] if fine else None,
        "iou_near": done.rows[-1]["iou_near"] if fine else None,
        "volume": volume(vertices, faces),
        "true_volume": volume(true_vertices, true_faces),
        "pictures": {
            "learnt": encode(picture(vertices, faces, size=size)),
            "truth": encode(picture(true_vertices, true_faces, size=size)),
        },
    }


def measure_solid(job: Costs[OccupancyJob], folder: Path) -> dict[str, Any]:
    """Measures a training step of every row, side by side, on one batch of points."""
    here, first = device(), job.rows[0]
    where, truth = (part.to(here) for part in draw_points(find_solid(first.solid), first.batch, first.seed))
    steps = {}
    for row in job.rows:
        model = _begin(row, here)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        steps[row.row] = Step(partial(_descend, model, optimizer, where, truth), model)
    return measure_steps(steps, here, job.budget)


def extract(logits: Callable[[Tensor], Tensor], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the surface on which logits, above 0 inside, are 0: by marching cubes in [-1, 1]^3, `grid` cells per side.

    Gives vertices ``(v, 3)`` and faces ``(f, 3)``, counter-clockwise from outside; empty where there is no surface. What leaves
    the cube is closed at its wall.

    Reference: Lorensen and Cline 1987, Marching cubes, https://doi.org/10.1145/37402.37422
    """
    from skimage.measure import marching_cubes

    places = torch.linspace(-1, 1, grid + 1)
    values = torch.empty(grid + 1, grid + 1, grid + 1)
    plane = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1).reshape(-1, 2)
    for index, x in enumerate(places):
        values[index] = logits(torch.cat([x.expand(len(plane), 1), plane], 1)).reshape(grid + 1, grid + 1)
    # A wall of outside about the cube closes what would be cut open.
    walled = functional.pad(values.nan_to_num(-1.0), (1,) * 6, value=min(-1e-3, float(values.nan_to_num(0.0).min())))
    if not bool((walled > 0).any()):
        return np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)
    vertices, faces, _, _ = marching_cubes(walled.numpy(), 0.0, gradient_direction="ascent")
    return (vertices - 1) * (2 / grid) - 1, faces.astype(np.int64)


def surface_of(solid: Solid, grid: int = _SHOWN) -> tuple[np.ndarray, np.ndarray]:
    """Gives the surface of a solid as triangles: a mesh's own, or by marching cubes with `grid` cells per side."""
    if isinstance(solid, MeshSolid):
        return solid.vertices, solid.faces
    value = getattr(solid, "value", None)
    return extract((lambda p: -value(p)) if value else (lambda p: solid.inside(p).float() - 0.5), grid)


def write_mesh(vertices: np.ndarray, faces: np.ndarray, folder: Path) -> None:
    """Writes ``mesh.ply`` and ``mesh.obj``; nothing where there is no surface."""
    import trimesh

    if not len(faces):
        return
    body = trimesh.Trimesh(vertices, faces, process=False)
    for ending in ("ply", "obj"):
        buffer = io.BytesIO()
        body.export(buffer, file_type=ending)
        write_bytes(folder / f"mesh.{ending}", buffer.getvalue())


def _begin(job: OccupancyJob, here: torch.device) -> nn.Module:
    reseed(job.seed, "init")
    model = occupancy(job.recipe, job.kind, width=job.width, depth=job.depth)
    scale_rows(model, job.scale)
    return model.to(here)


def _descend(model: nn.Module, optimizer: torch.optim.Optimizer, where: Tensor, truth: Tensor) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(model(where), truth.float())
    if not torch.isfinite(loss):
        raise Diverged
    descend(optimizer, loss)
    return loss


@torch.no_grad()
def _logits(model: nn.Module, points: Tensor) -> Tensor:
    return torch.cat([model(part) for part in points.split(_CHUNK)])
