"""Where vertical lines cross a triangle mesh: what is inside it, and what it looks like from above, follow from that."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

VIEW = 30.0, 20.0  # degrees about y, and downwards
_PAIRS = 2_000_000  # of a line and a triangle near it, held at a time


@dataclass(frozen=True)
class Crossings:
    """Points at which lines parallel to z go through triangles."""

    line: np.ndarray  # (k,), which line
    face: np.ndarray  # (k,), which triangle
    height: np.ndarray  # (k,), z of the point
    shares: np.ndarray  # (k, 3), barycentric coordinates of the point


def crossings(vertices: np.ndarray, faces: np.ndarray, lines: np.ndarray) -> Iterator[Crossings]:
    """Finds all crossings, some lines at a time.

    A line that meets an edge or a corner exactly is moved by an infinitesimal step to the right and a still smaller one
    up, the same for all triangles; so a line crosses a closed surface an even number of times, whatever it meets.
    Vertices ``(v, 3)``, faces ``(f, 3)`` as rows of vertices, lines ``(n, 2)`` as x and y of each.

    Reference: Edelsbrunner and Mücke 1990, Simulation of simplicity, https://doi.org/10.1145/77635.77639
    """
    if not len(faces):
        return
    corners = vertices[faces]
    flat = corners[:, :, :2]
    low, high = flat.min((0, 1)), flat.max((0, 1))
    side = _side_of_grid(flat, high - low)
    scale = side / np.maximum(high - low, 1e-300)
    first, count, listed = _shelve(flat, low, scale, side)
    inside = np.flatnonzero(((lines >= low) & (lines <= high)).all(1))
    cell = np.minimum(((lines[inside] - low) * scale).astype(int), side - 1)
    shelf = cell[:, 0] * side + cell[:, 1]
    total = np.concatenate([[0], count[shelf].cumsum()])
    begin = 0
    while begin < len(inside):
        end = max(begin + 1, int(np.searchsorted(total, total[begin] + _PAIRS, side="right")) - 1)
        here = shelf[begin:end]
        line = np.repeat(inside[begin:end], count[here])
        place = np.arange(total[end] - total[begin]) - np.repeat(total[begin:end] - total[begin], count[here])
        face = listed[np.repeat(first[here], count[here]) + place]
        yield _cross(corners, face, line, lines)
        begin = end


def inside_mesh(vertices: np.ndarray, faces: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Says which points a closed surface has around them: those with an odd number of crossings above.

    Vertices ``(v, 3)``, faces ``(f, 3)`` in any order and orientation, points ``(n, 3)``.
    """
    odd = np.zeros(len(points), dtype=bool)
    for found in crossings(vertices, faces, points[:, :2]):
        above = found.line[found.height > points[found.line, 2]]
        odd ^= np.bincount(above, minlength=len(points)) % 2 == 1
    return odd


def picture(vertices: np.ndarray, faces: np.ndarray, *, size: int = 256) -> np.ndarray:
    """Draws a surface in parallel projection, lit from above the viewer's left shoulder, on white.

    Vertices ``(v, 3)`` lie in [-1, 1]^3, y up and z to the viewer; faces ``(f, 3)`` are counter-clockwise from outside.
    The viewer looks down on it, turned about y. Gives ``(size, size, 3)`` from 0 to 1.
    """
    from scipy.spatial.transform import Rotation

    turned = vertices @ Rotation.from_euler("yx", VIEW, degrees=True).as_matrix().T
    normals = _vertex_normals(turned, faces)
    fine = 2 * size  # four lines a pixel smooth the outline
    across = (np.arange(fine) + 0.5) / fine * 2.4 - 1.2
    y, x = np.meshgrid(-across, across, indexing="ij")
    lines = np.stack([x.ravel(), y.ravel()], 1)
    image = np.ones((fine * fine, 3))
    for found in crossings(turned, faces, lines):
        order = np.lexsort((found.height, found.line))
        line = found.line[order]
        top = order[np.append(line[1:] != line[:-1], True)] if len(line) else order
        normal = (normals[faces[found.face[top]]] * found.shares[top][:, :, None]).sum(1)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        image[found.line[top]] = _shade(normal)
    return image.reshape(size, 2, size, 2, 3).mean((1, 3))


def _side_of_grid(flat: np.ndarray, extent: np.ndarray) -> int:
    """As many cells as triangles; but half a triangle at the least, as each is listed in all the cells that it touches."""
    widths = (flat.max(1) - flat.min(1)).mean(0)
    return max(1, round(min(len(flat) ** 0.5, *(2 * extent / np.maximum(widths, 1e-300)))))


def _shelve(
    flat: np.ndarray, low: np.ndarray, scale: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists, for every cell of a square grid, the triangles whose bounding box touches it."""
    least = np.clip(((flat.min(1) - low) * scale).astype(int), 0, side - 1)
    most = np.clip(((flat.max(1) - low) * scale).astype(int), 0, side - 1)
    spans = most - least + 1
    cells = spans.prod(1)
    face = np.repeat(np.arange(len(flat)), cells)
    place = np.arange(cells.sum()) - np.repeat(cells.cumsum() - cells, cells)
    column, row = least[face, 0] + place // spans[face, 1], least[face, 1] + place % spans[face, 1]
    shelf = column * side + row
    order = np.argsort(shelf, kind="stable")
    count = np.bincount(shelf, minlength=side * side)
    return count.cumsum() - count, count, face[order]


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


def _vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    across = np.cross(b - a, c - a)
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], across)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)


def _shade(normal: np.ndarray) -> np.ndarray:
    key = np.array([-0.45, 0.65, 0.61])
    # Wrapped diffuse light: shadows stay readable without a second lamp.
    light = 0.16 + 0.84 * np.clip((normal @ key + 0.25) / 1.25, 0, 1)
    return np.clip(light[:, None] * np.array([0.93, 0.9, 0.86]), 0, 1)
