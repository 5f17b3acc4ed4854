"""Solids given by a closed triangle mesh."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.core.errors import ProtocolError
from normkit.lab.data.crossings import inside_mesh
from normkit.lab.data.root import data_root, reading

FOLDER = "meshes"
ENDINGS = (".ply", ".obj", ".off", ".stl")
FILLS = 0.9  # the longest side of the bounding box spans [-0.9, 0.9]
_CURE = (
    f"put a closed mesh (.ply, .obj, .off or .stl), such as one of the Stanford 3D Scanning Repository "
    f"(https://graphics.stanford.edu/data/3Dscanrep), into DATA_ROOT/{FOLDER} and give --data-root DATA_ROOT"
)


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Measures what a closed surface encloses, sum of det(a, b, c) / 6 over its triangles; below 0 where it is inside out."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    return float((a * np.cross(b, c)).sum()) / 6


class MeshSolid:
    """A closed triangle mesh, moved and scaled into [-1, 1]^3.

    Faces ``(f, 3)`` are rows of vertices ``(v, 3)``, all counter-clockwise from outside or all clockwise; kept are
    those of outside.
    """

    def __init__(self, name: str, vertices: np.ndarray, faces: np.ndarray) -> None:
        low, high = vertices.min(0), vertices.max(0)
        self.name = name
        self.vertices = (vertices - (low + high) / 2) * (2 * FILLS / (high - low).max())
        self.faces = faces if volume(self.vertices, faces) >= 0 else faces[:, ::-1]
        a, b, c = (self.vertices[self.faces[:, corner]] for corner in range(3))
        across = np.cross(b - a, c - a)
        self._area_sums = np.linalg.norm(across, axis=1).cumsum()

    def inside(self, points: Tensor) -> Tensor:
        """Says which points are in the body."""
        return torch.from_numpy(inside_mesh(self.vertices, self.faces, points.double().numpy()))

    def surface(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws points on the surface, evenly by area."""
        draws = torch.rand(count, 3, generator=generator, dtype=torch.float64).numpy()
        face = np.searchsorted(self._area_sums, draws[:, 0] * self._area_sums[-1], side="right")
        root = np.sqrt(draws[:, 1])
        shares = np.stack([1 - root, root * (1 - draws[:, 2]), root * draws[:, 2]], 1)
        corners = self.vertices[self.faces[np.minimum(face, len(self.faces) - 1)]]
        return torch.from_numpy((corners * shares[:, :, None]).sum(1)).float()


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
    """Reads a mesh; vertices that differ in texture or normal alone are one.

    Reference: trimesh, https://trimesh.org
    """
    import trimesh

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
