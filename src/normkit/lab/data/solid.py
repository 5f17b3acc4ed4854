"""Solids in [-1, 1]^3, by formula or by a closed triangle mesh: points in them and about their surface, and their pictures."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from normkit.core.errors import ProtocolError
from normkit.lab.data.root import data_root, reading

VIEW = 30.0, 20.0  # degrees about y, and downwards
_FACES = 50_000  # whose pairs with the lines near them are held at a time
FOLDER = "meshes"
ENDINGS = (".ply", ".obj", ".off", ".stl")
FILLS = 0.9  # the longest side of the bounding box spans [-0.9, 0.9]
_STEPS = 12  # of Newton's method towards the surface
_CLOSE = 1e-4
SPREAD = 0.01  # standard deviation of points about the surface


@dataclass(frozen=True)
class Crossings:
    """Points at which lines parallel to z go through triangles."""

    line: np.ndarray  # (k,), which line
    face: np.ndarray  # (k,), which triangle
    height: np.ndarray  # (k,), z of the point
    shares: np.ndarray  # (k, 3), barycentric coordinates of the point


def crossings(vertices: np.ndarray, faces: np.ndarray, lines: np.ndarray) -> Crossings:
    """Finds all crossings.

    A line that meets an edge or a corner exactly is moved by an infinitesimal step to the right and a still smaller one
    up, the same for all triangles; so a line crosses a closed surface an even number of times, whatever it meets.
    Vertices ``(v, 3)``, faces ``(f, 3)`` as rows of vertices, lines ``(n, 2)`` as x and y of each.

    Reference: Edelsbrunner and Mücke 1990, Simulation of simplicity, https://doi.org/10.1145/77635.77639
    """
    corners = vertices[faces]
    low, high = corners[:, :, :2].min(1), corners[:, :, :2].max(1)
    # A little more than half of each bounding square, as centres are rounded.
    reach = (high - low).max(1) / 2 + 1e-9 * np.abs(corners).max(initial=0.0)
    tree, found = KDTree(lines), []
    for begin in range(0, len(faces) or 1, _FACES):
        part = slice(begin, begin + _FACES)
        near = tree.query_ball_point((low + high)[part] / 2, reach[part], p=np.inf)
        face = begin + np.repeat(np.arange(len(near)), np.fromiter(map(len, near), int))
        found.append(_cross(corners, face, np.fromiter(chain.from_iterable(near), int), lines))
    return Crossings(*(np.concatenate([getattr(one, key) for one in found]) for key in Crossings.__dataclass_fields__))


def inside_mesh(vertices: np.ndarray, faces: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Says which points ``(n, 3)`` a closed surface has around them: those with an odd number of crossings above."""
    found = crossings(vertices, faces, points[:, :2])
    above = found.line[found.height > points[found.line, 2]]
    return np.bincount(above, minlength=len(points)) % 2 == 1


def picture(vertices: np.ndarray, faces: np.ndarray, *, size: int = 256) -> np.ndarray:
    """Draws a surface in parallel projection, lit from above the viewer's left shoulder, on white."""
    turned = vertices @ Rotation.from_euler("yx", VIEW, degrees=True).as_matrix().T
    normals = trimesh.Trimesh(turned, faces, process=False).vertex_normals
    fine = 2 * size  # four lines a pixel smooth the outline
    across = (np.arange(fine) + 0.5) / fine * 2.4 - 1.2
    y, x = np.meshgrid(-across, across, indexing="ij")
    found, image = crossings(turned, faces, np.stack([x.ravel(), y.ravel()], 1)), np.ones((fine * fine, 3))
    order = np.lexsort((found.height, found.line))
    top = order[np.diff(found.line[order], append=-1) != 0]
    normal = (normals[faces[found.face[top]]] * found.shares[top][:, :, None]).sum(1)
    image[found.line[top]] = _shade(normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12))
    return image.reshape(size, 2, size, 2, 3).mean((1, 3))


def _cross(corners: np.ndarray, face: np.ndarray, line: np.ndarray, lines: np.ndarray) -> Crossings:
    triangle, point = corners[face], lines[line]
    left, areas = np.empty((3, len(face)), dtype=bool), np.empty((3, len(face)))
    for edge in range(3):
        left[edge], areas[edge] = _side(triangle[:, (edge + 1) % 3, :2], triangle[:, (edge + 2) % 3, :2], point)
    hit = (left[0] == left[1]) & (left[1] == left[2])
    shares = areas[:, hit]
    total = shares.sum(0)
    shares = np.where(total == 0, 1 / 3, shares / np.where(total == 0, 1, total)).T
    height = (shares * triangle[hit][:, :, 2]).sum(1)
    return Crossings(line[hit], face[hit], height, shares)


def _side(a: np.ndarray, b: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether the moved point is left of the edge from a to b, and twice the area it spans with it."""
    # Both triangles at an edge must round alike, so it is always measured from the same end.
    swap = (a[:, 0] > b[:, 0]) | ((a[:, 0] == b[:, 0]) & (a[:, 1] > b[:, 1]))
    start, end = np.where(swap[:, None], b, a), np.where(swap[:, None], a, b)
    dx, dy = (end - start).T
    area = dx * (point[:, 1] - start[:, 1]) - dy * (point[:, 0] - start[:, 0])
    left = (area > 0) | ((area == 0) & ((dy < 0) | ((dy == 0) & (dx > 0))))
    return left ^ swap, np.where(swap, -area, area)


def _shade(normal: np.ndarray) -> np.ndarray:
    key = np.array([-0.45, 0.65, 0.61])
    # Wrapped diffuse light: shadows stay readable without a second lamp.
    light = 0.16 + 0.84 * np.clip((normal @ key + 0.25) / 1.25, 0, 1)
    return np.clip(light[:, None] * np.array([0.93, 0.9, 0.86]), 0, 1)


_CURE = (
    f"put a closed mesh (.ply, .obj, .off or .stl), such as one of the Stanford 3D Scanning Repository "
    f"(https://graphics.stanford.edu/data/3Dscanrep), into DATA_ROOT/{FOLDER} and give --data-root DATA_ROOT"
)


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Measures what a closed surface encloses, sum of det(a, b, c) / 6 over its triangles; below 0 where it is inside out."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    return float((a * np.cross(b, c)).sum()) / 6


class MeshSolid:
    """A closed triangle mesh, moved and scaled into [-1, 1]^3."""

    def __init__(self, name: str, vertices: np.ndarray, faces: np.ndarray) -> None:
        low, high = vertices.min(0), vertices.max(0)
        self.name = name
        self.vertices = (vertices - (low + high) / 2) * (2 * FILLS / (high - low).max())
        self.faces = faces if volume(self.vertices, faces) >= 0 else faces[:, ::-1]

    def inside(self, points: Tensor) -> Tensor:
        """Says which points are in the body."""
        return torch.from_numpy(inside_mesh(self.vertices, self.faces, points.double().numpy()))

    def surface(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws points on the surface, evenly by area."""
        seed, body = (
            torch.randint(2**31, (), generator=generator),
            trimesh.Trimesh(self.vertices, self.faces, process=False),
        )
        return torch.from_numpy(trimesh.sample.sample_surface(body, count, seed=int(seed))[0]).float()


def mesh(name: str, root: Path | None = None) -> MeshSolid:
    """Reads a mesh by name from the folder ``meshes``."""
    folder = data_root(root) / FOLDER
    for ending in ENDINGS:
        if (path := folder / f"{name}{ending}").is_file():
            return read_mesh(path)
    known = sorted({path.stem for path in folder.glob("*") if path.suffix in ENDINGS})
    has = f"; the folder holds {', '.join(known)}" if known else ""
    raise ProtocolError(f"{folder / name}{{{','.join(ENDINGS)}}} is missing{has}; {_CURE}")


def read_mesh(path: Path) -> MeshSolid:
    """Reads a mesh; vertices that differ in texture or normal alone are one."""
    with reading(path, "copy it again"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged file we say more ourselves
            found: Any = trimesh.load(path, force="mesh")
        found.merge_vertices(merge_tex=True, merge_norm=True)
        found.update_faces(found.nondegenerate_faces())
        vertices, faces = np.asarray(found.vertices, np.float64), np.asarray(found.faces)
    if not len(faces) or not np.isfinite(vertices).all():
        raise ProtocolError(f"{path} holds {len(faces)} triangles, or corners that are not finite; copy it again")
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    shared = np.unique(edges, axis=0, return_counts=True)[1]
    if (open_edges := int((shared % 2 != 0).sum())) > 0:
        raise ProtocolError(
            f"{path} is not watertight: {open_edges} of its {len(shared)} edges end at a hole; without an inside there is "
            "nothing to learn. Fill the holes (MeshLab: Filters, Remeshing, Close Holes) or take another mesh"
        )
    return MeshSolid(path.stem, vertices, faces)


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


Solid = Shape | MeshSolid


def find_solid(name: str, root: Path | None = None) -> Solid:
    """Finds a solid by name: an analytic shape, or a mesh of the folder ``meshes``, by its file without ending."""
    return SHAPES[name] if name in SHAPES else mesh(name, root)


def draw_points(solid: Solid, count: int, seed: int, near: float = 0.5) -> tuple[Tensor, Tensor]:
    """Draws points ``(count, 3)``, the part `near` of them about the surface, in random order, and whether each is inside."""
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
