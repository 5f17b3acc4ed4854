"""Scenes and solids: what is read from disk, insides against closed forms, awkward lines, and samples."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from normkit.core.errors import ProtocolError
from normkit.lab.data.root import data_root
from normkit.lab.data.scene import llff, recentre
from normkit.lab.data.solid import (
    SHAPES,
    MeshSolid,
    crossings,
    draw_points,
    find_solid,
    gyroid,
    inside_mesh,
    iou,
    mesh,
    picture,
    read_mesh,
    torus,
    volume,
)

VIEWS = 9


@pytest.fixture
def llff_root(tmp_path: Path) -> Path:
    """Nine cameras that look along -z with a little shift; in the file's axes: down, right, backward."""
    folder = tmp_path / "nerf_llff_data" / "tiny"
    (folder / "images_8").mkdir(parents=True)
    rows = []
    for view in range(VIEWS):
        pixels = np.full((6, 8, 3), 20 * view, np.uint8)
        pixels[:, :4] += 4
        Image.fromarray(pixels).save(folder / "images_8" / f"image{view:03d}.png")
        columns = [[0.0, -1, 0], [1, 0, 0], [0, 0, 1], [view - 4.0, 0, 0], [48, 64, 80]]
        rows.append([*np.array(columns).T.ravel(), 4.0 + view, 50.0])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return tmp_path


def test_llff_scene(llff_root: Path) -> None:
    scene = llff(llff_root, "tiny")
    assert (scene.test, scene.train, scene.size, scene.focal) == ((0, 8), (1, 2, 3, 4, 5, 6, 7), (6, 8), (10.0, 10.0))
    assert_close(scene.images[2, 0], torch.tensor([44 / 255] * 4 + [40 / 255] * 4)[:, None].expand(8, 3))
    assert_close(scene.poses[:, :, :3], torch.eye(3).expand(VIEWS, 3, 3))
    # The nearest bound, 4, comes to lie at 4/3.
    assert_close(scene.poses[:, 0, 3], (torch.arange(9.0) - 4) / 3)
    rays = scene.rays((1, 3))
    assert len(rays) == 2 * 6 * 8
    assert (rays.near, rays.far) == (0.0, 1.0)
    assert_close((rays.origins[:, 2], rays.looks.norm(dim=1)), (-torch.ones(96), torch.ones(96)))


def test_llff_reduced(llff_root: Path) -> None:
    scene = llff(llff_root, "tiny", reduce=2)
    assert (scene.size, scene.focal) == ((3, 4), (5.0, 5.0))
    assert_close(scene.images[2, 0], torch.tensor([44 / 255] * 2 + [40 / 255] * 2)[:, None].expand(4, 3))


def test_recentring_keeps_the_cameras_relative() -> None:
    generator = np.random.default_rng(0)
    turns = np.linalg.qr(np.eye(3) + 0.1 * generator.standard_normal((5, 3, 3)))[0]
    turns *= np.sign(np.linalg.det(turns))[:, None, None]
    turns[turns[:, 2, 2] < 0] *= np.array([-1, 1, -1])
    poses = np.concatenate([turns, generator.standard_normal((5, 3, 1))], 2)
    moved = recentre(poses)
    np.testing.assert_allclose(moved[:, :, 3].mean(0), 0, atol=1e-12)
    back = moved[:, :, 2].sum(0)
    np.testing.assert_allclose(back / np.linalg.norm(back), [0, 0, 1], atol=1e-12)
    relative = [p[0, :, :3].T @ (p[1, :, 3] - p[0, :, 3]) for p in (poses, moved)]
    np.testing.assert_allclose(*relative, atol=1e-12)


def set_rows(places: Any, value: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        rows = np.load(path)
        rows[:, places] = value
        np.save(path, rows)

    return damage


def turn(about: int) -> Callable[[Path], None]:
    """Turns every other camera half round about one of its axes: down (it looks back) or backward (it stands on its head)."""

    def damage(path: Path) -> None:
        rows = np.load(path)
        for axis in {0, 1, 2} - {about}:
            rows[1::2, [axis, axis + 5, axis + 10]] *= -1
        np.save(path, rows[:8])
        for photograph in sorted((path.parent / "images_8").iterdir())[8:]:
            photograph.unlink()

    return damage


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "removed": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbled": lambda path: path.write_bytes(b"not what it was"),
    "resized": lambda path: Image.new("RGB", (5, 5)).save(path),
    "fewer": lambda path: np.save(path, np.load(path)[:-1]),
    "flat": lambda path: np.save(path, np.load(path)[:, :15]),
    "text": lambda path: np.save(path, np.load(path).astype(str)),
    "without bounds": set_rows(slice(None), 0.0),
    "without cameras": set_rows(slice(0, 15), 0.0),
    "negative height": set_rows(4, -48.0),
    "no focal length": set_rows(14, 0.0),
    "not a number": set_rows(3, math.nan),
    "no axes": set_rows([0, 1, 2, 5, 6, 7, 10, 11, 12], 0.0),
    "skewed": set_rows(2, 0.5),
    "mirrored": set_rows(12, -1.0),
    "on their heads": turn(2),
    "looking back": turn(0),
}


def test_one_view_is_no_scene(llff_root: Path) -> None:
    folder = llff_root / "nerf_llff_data" / "tiny"
    for photograph in sorted((folder / "images_8").iterdir())[1:]:
        photograph.unlink()
    np.save(folder / "poses_bounds.npy", np.load(folder / "poses_bounds.npy")[:1])
    with pytest.raises(ProtocolError, match=r"holds an array \(1, 17\); wanted two views at least"):
        llff(llff_root, "tiny")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("removed", "poses_bounds.npy is missing; unpack nerf_llff_data.zip"),
        ("cut", "poses_bounds.npy is truncated or damaged"),
        ("garbled", "poses_bounds.npy is truncated or damaged"),
        ("fewer", "holds 9 pictures, poses_bounds.npy 8 poses"),
        ("flat", r"holds an array \(9, 15\)"),
        ("without bounds", "holds a bound that is not above 0"),
        *(
            (name, "a height, width or focal length that is not above 0")
            for name in ("without cameras", "negative height", "no focal length")
        ),
        ("not a number", r"holds an array \(9, 17\); wanted finite numbers"),
        ("no axes", "a camera whose axes are not at right angles, of length 1"),
        ("skewed", "a camera whose axes are not at right angles, of length 1"),
        ("mirrored", "a camera whose axes are not .* right-handed"),
        ("on their heads", "cameras that look different ways"),
        ("looking back", "cameras that look different ways"),
        ("text", r"holds an array \(9, 17\); wanted finite numbers"),
        ("removed photograph", "holds 8 pictures, poses_bounds.npy 9 poses"),
        ("cut photograph", r"image003.png is truncated or damaged"),
        ("garbled photograph", r"image003.png is truncated or damaged"),
        ("resized photograph", r"image003.png has shape \(5, 5, 3\)"),
    ],
)
def test_damaged_llff(llff_root: Path, damage: str, message: str) -> None:
    what = damage.removesuffix(" photograph")
    file = "images_8/image003.png" if damage != what else "poses_bounds.npy"
    DAMAGE[what](llff_root / "nerf_llff_data" / "tiny" / file)
    with pytest.raises(ProtocolError, match=message):
        llff(llff_root, "tiny")


def test_missing_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProtocolError, match=r"fern is missing; unpack nerf_llff_data.zip"):
        llff(tmp_path)
    monkeypatch.delenv("NORMKIT_DATA", raising=False)
    with pytest.raises(ProtocolError, match="--data-root DIR or set the environment variable NORMKIT_DATA"):
        llff()
    with pytest.raises(ProtocolError, match="is no folder"):
        data_root(tmp_path / "absent")


@pytest.mark.skipif(
    not (Path(os.environ.get("NORMKIT_DATA", "")) / "nerf_llff_data" / "fern").is_dir()
    or "NORMKIT_DATA" not in os.environ,
    reason="NORMKIT_DATA holds no nerf_llff_data/fern",
)
def test_fern() -> None:
    scene = llff(reduce=6)
    assert (scene.test, scene.size) == ((0, 8, 16), (63, 84))
    assert_close(scene.focal[0], 3260.526 * 84 / 4032, rtol=1e-4, atol=0)
    # Cameras stand close together, look the same way and lie within the unit cube of NDC.
    assert float(scene.poses[:, 2, 2].min()) > 0.95
    assert float(scene.rays(scene.train).origins.abs().max()) < 1.5


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
    count = np.bincount(crossings(vertices, faces, lines).line, minlength=len(lines))
    np.testing.assert_array_equal(count % 2, 0)


def test_crossings_lie_on_their_triangles() -> None:
    body = trimesh.creation.icosphere(subdivisions=2)
    vertices, faces = np.asarray(body.vertices, np.float64), np.asarray(body.faces)
    lines = uniform(500)[:, :2].double().numpy()
    found = crossings(vertices, faces, lines)
    points = (vertices[faces[found.face]] * found.shares[:, :, None]).sum(1)
    np.testing.assert_allclose(points[:, :2], lines[found.line], atol=1e-12)
    np.testing.assert_allclose(points[:, 2], found.height, atol=1e-12)
    assert bool((found.shares >= -1e-12).all())


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
