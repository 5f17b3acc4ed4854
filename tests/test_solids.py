"""Solids: insides against closed forms, awkward lines, samples, and meshes on disk."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor
from torch.testing import assert_close

from normkit.core.errors import ProtocolError
from normkit.lab.data.crossings import _shelve, _side_of_grid, crossings, inside_mesh, picture
from normkit.lab.data.mesh import MeshSolid, mesh, read_mesh, volume
from normkit.lab.data.solid import SHAPES, draw_points, find_solid, gyroid, iou, torus


def solid_of(body: trimesh.Trimesh) -> MeshSolid:
    return MeshSolid("body", np.asarray(body.vertices, np.float64), np.asarray(body.faces))


def uniform(count: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) - 1


def test_inside_a_fine_sphere() -> None:
    solid = solid_of(trimesh.creation.icosphere(subdivisions=4))
    points = uniform(20_000)
    # Its facets lie within 0.3 % of the ball of radius 0.9.
    sure = (points.norm(dim=1) - 0.9).abs() > 0.005
    assert torch.equal(solid.inside(points)[sure], (points.norm(dim=1) < 0.9)[sure])


def test_lines_through_corners_and_edges_cross_twice() -> None:
    # The corners, edges and diagonals of a subdivided cube all lie on this grid of lines.
    body = trimesh.creation.box(extents=(2, 2, 2)).subdivide().subdivide()
    steps = np.linspace(-1.25, 1.25, 21)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    off = (np.abs(np.abs(grid) - 1) > 1e-9).all(1)
    found = inside_mesh(np.asarray(body.vertices, np.float64), np.asarray(body.faces), grid)
    np.testing.assert_array_equal(found[off], (np.abs(grid) < 1).all(1)[off])


def test_every_line_crosses_an_awkward_mesh_evenly() -> None:
    body = trimesh.creation.torus(0.6, 0.25, major_sections=17, minor_sections=8)
    vertices, faces = np.asarray(body.vertices, np.float64), np.asarray(body.faces)
    lines = np.concatenate([vertices[:, :2], vertices[faces][:, :2, :2].mean(1)])  # corners, and middles of edges
    count = sum(np.bincount(found.line, minlength=len(lines)) for found in crossings(vertices, faces, lines))
    np.testing.assert_array_equal(np.asarray(count) % 2, 0)


def test_crossings_lie_on_their_triangles() -> None:
    body = trimesh.creation.icosphere(subdivisions=2)
    vertices, faces = np.asarray(body.vertices, np.float64), np.asarray(body.faces)
    lines = uniform(500)[:, :2].double().numpy()
    for found in crossings(vertices, faces, lines):
        points = (vertices[faces[found.face]] * found.shares[:, :, None]).sum(1)
        np.testing.assert_allclose(points[:, :2], lines[found.line], atol=1e-12)
        np.testing.assert_allclose(points[:, 2], found.height, atol=1e-12)
        assert bool((found.shares >= -1e-12).all())


def test_a_body_that_is_surface_throughout_takes_no_more_memory_than_its_triangles() -> None:
    # As what has not been learnt gives: with as many cells as triangles, each of these would be listed in 100.
    drawn = np.random.default_rng(0)
    flat = drawn.uniform(size=(20_000, 1, 2)) + drawn.uniform(0, 0.07, size=(20_000, 3, 2))
    low, extent = flat.min((0, 1)), flat.max((0, 1)) - flat.min((0, 1))
    side = _side_of_grid(flat, extent)
    assert len(_shelve(flat, low, side / extent, side)[2]) < 16 * len(flat)


def test_a_mesh_fills_the_cube() -> None:
    solid = solid_of(trimesh.creation.box(extents=(4, 2, 1)).apply_translation((7, 8, 9)))
    np.testing.assert_allclose(np.abs(solid.vertices).max(0), [0.9, 0.45, 0.225])
    assert volume(solid.vertices, solid.faces) == pytest.approx(1.8 * 0.9 * 0.45)


def test_an_inside_out_mesh_is_turned() -> None:
    body = trimesh.creation.icosphere(subdivisions=2)
    right = solid_of(body)
    body.invert()
    turned = solid_of(body)
    assert volume(turned.vertices, turned.faces) == pytest.approx(volume(right.vertices, right.faces))
    assert volume(right.vertices, right.faces) > 0
    assert torch.equal(turned.inside(uniform(500)), right.inside(uniform(500)))


def test_surface_points_are_even_by_area() -> None:
    solid = solid_of(trimesh.creation.box(extents=(2, 2, 0.5)))
    points = solid.surface(20_000, torch.Generator().manual_seed(0))
    half = torch.tensor([0.9, 0.9, 0.225])
    at = (points.abs() - half).abs() < 1e-6
    assert bool(at.any(1).all())
    # Two faces of 4, four of 1: two thirds lie on top and bottom; 20,000 draws, 4 standard deviations.
    assert_close(at[:, 2].float().mean(), torch.tensor(2 / 3), rtol=0, atol=0.014)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_points_on_their_surface(name: str) -> None:
    shape = SHAPES[name]
    points = shape.surface(200, torch.Generator().manual_seed(0))
    assert points.shape == (200, 3)
    assert float(shape.value(points).abs().max()) < 2e-4
    assert float(points.abs().max()) <= 1
    # They lie inside of the cube with room about them.
    assert not shape.inside(uniform(5000)[uniform(5000).abs().amax(1) > 0.97]).any()


def test_gyroid_is_a_sheet_with_two_sides() -> None:
    shape = gyroid()
    x, y, z = torch.tensor([0.5, 0.2, 0.1])
    sines, cosines = zip(*((math.sin(7 * at), math.cos(7 * at)) for at in (x, y, z)), strict=True)
    value = abs(sum(sines[k] * cosines[(k + 1) % 3] for k in range(3)))
    assert bool(shape.inside(torch.tensor([[x, y, z]]))) == (value < 0.35)


def test_points_half_near_half_anywhere() -> None:
    points, inside = draw_points(torus(), 4000, seed=3)
    away = torus().value(points).abs()
    assert torch.equal(inside, torus().inside(points))
    # Distances of the near half are N(0, 0.01^2); of the others a twentieth or so are as near.
    assert 0.5 < float((away < 0.04).float().mean()) < 0.6
    again = draw_points(torus(), 4000, seed=3)
    assert torch.equal(again[0], points)
    assert not torch.equal(draw_points(torus(), 4000, seed=4)[0], points)


def test_iou() -> None:
    a, b = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([0, 1, 1, 1]).bool()
    assert iou(a, b) == 0.5
    assert iou(a, a) == 1.0
    assert iou(a, ~a) == 0.0
    assert iou(a & ~a, a & ~a) == 1.0


@pytest.mark.parametrize("ending", ["ply", "obj", "off", "stl"])
def test_meshes_are_read(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "meshes"
    folder.mkdir()
    trimesh.creation.icosphere(subdivisions=1).export(folder / f"ball.{ending}")
    solid = mesh("ball", tmp_path)
    assert (len(solid.vertices), len(solid.faces)) == (42, 80)  # an STL's triangles get their shared corners back
    assert find_solid("ball", tmp_path).name == "ball"


def test_missing_and_open_meshes(tmp_path: Path) -> None:
    (tmp_path / "meshes").mkdir()
    body = trimesh.creation.box()
    body.export(tmp_path / "meshes" / "box.ply")
    with pytest.raises(ProtocolError, match=r"bunny.* is missing; the folder holds box; put a closed mesh"):
        mesh("bunny", tmp_path)
    body.update_faces(np.arange(len(body.faces)) > 0)
    body.export(tmp_path / "open.ply")
    with pytest.raises(ProtocolError, match=r"not watertight: 3 of its 18 edges end at a hole.*Fill the holes"):
        read_mesh(tmp_path / "open.ply")


@pytest.mark.parametrize("content", [b"", b"OFF\n3 1", b"\x00\xff\x00"])
@pytest.mark.parametrize("ending", ["ply", "obj", "off", "stl"])
def test_damaged_mesh(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(content)
    with pytest.raises(ProtocolError, match=rf"bad.{ending} (is truncated or damaged|holds 0 triangles).*copy it"):
        read_mesh(path)


def test_picture_of_a_ball() -> None:
    body = trimesh.creation.icosphere(subdivisions=3)
    image = picture(0.9 * np.asarray(body.vertices), np.asarray(body.faces), size=48)
    covered = (image < 0.99).any(-1)
    # A disc of radius 0.9 in a window 2.4 wide.
    assert covered.mean() == pytest.approx(math.pi * 0.9**2 / 2.4**2, rel=0.05)
    top, bottom = image[10:16, 24].mean(), image[32:38, 24].mean()
    assert top > bottom  # lit from above


@pytest.mark.skipif(
    "NORMKIT_DATA" not in os.environ or not (Path(os.environ["NORMKIT_DATA"]) / "meshes").is_dir(),
    reason="NORMKIT_DATA holds no meshes",
)
def test_stanford_meshes() -> None:
    for name, faces in (("bunny", 6966), ("armadillo", 86482)):
        solid = mesh(name)
        assert len(solid.faces) == faces
        share = float(solid.inside(uniform(50_000)).double().mean()) * 8
        # 4 standard deviations of 50,000 draws.
        assert share == pytest.approx(volume(solid.vertices, solid.faces), abs=4 * 8 * math.sqrt(share / 8 / 50_000))
    with pytest.raises(ProtocolError, match=r"stanford-bunny.obj is not watertight"):
        mesh("stanford-bunny")
