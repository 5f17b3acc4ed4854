"""Scenes on disk: what is read, and what is said of files that are missing or damaged."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from normkit.core.errors import ProtocolError
from normkit.lab.data.blender import blender
from normkit.lab.data.llff import llff, recentre
from normkit.lab.data.root import data_root

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


@pytest.fixture
def blender_root(tmp_path: Path) -> Path:
    folder = tmp_path / "nerf_synthetic" / "tiny"
    for part, count in (("train", 3), ("test", 9)):
        (folder / part).mkdir(parents=True)
        frames = []
        for view in range(count):
            pixels = np.zeros((8, 8, 4), np.uint8)
            pixels[:, 4:] = (255, 0, 0, 51)
            Image.fromarray(pixels).save(folder / part / f"r_{view}.png")
            pose = np.eye(4)
            pose[2, 3] = view
            frames.append({"file_path": f"./{part}/r_{view}", "transform_matrix": pose.tolist()})
        cameras = {"camera_angle_x": math.pi / 2, "frames": frames}
        (folder / f"transforms_{part}.json").write_text(json.dumps(cameras))
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


def test_blender_scene(blender_root: Path) -> None:
    scene = blender(blender_root, "tiny")
    assert scene.train == (0, 1, 2)
    assert scene.test == (3, 4)  # the test views 0 and 8
    assert scene.size == (4, 4)
    assert_close((scene.focal[0], scene.poses[4, :, 3]), (2.0, torch.tensor([0.0, 0.0, 8.0])))
    # A fifth of red over white.
    assert_close(scene.images[0, 0], torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 0.8, 0.8], [1, 0.8, 0.8]]))
    assert not scene.ndc


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
        for picture in sorted((path.parent / "images_8").iterdir())[8:]:
            picture.unlink()

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
    for picture in sorted((folder / "images_8").iterdir())[1:]:
        picture.unlink()
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
        ("removed picture", "holds 8 pictures, poses_bounds.npy 9 poses"),
        ("cut picture", r"image003.png is truncated or damaged"),
        ("garbled picture", r"image003.png is truncated or damaged"),
        ("resized picture", r"image003.png has shape \(5, 5, 3\)"),
    ],
)
def test_damaged_llff(llff_root: Path, damage: str, message: str) -> None:
    what = damage.removesuffix(" picture")
    file = "images_8/image003.png" if damage != what else "poses_bounds.npy"
    DAMAGE[what](llff_root / "nerf_llff_data" / "tiny" / file)
    with pytest.raises(ProtocolError, match=message):
        llff(llff_root, "tiny")


def test_missing_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProtocolError, match=r"fern is missing; unpack nerf_llff_data.zip"):
        llff(tmp_path)
    with pytest.raises(ProtocolError, match=r"lego is missing; unpack nerf_synthetic.zip"):
        blender(tmp_path)
    monkeypatch.delenv("NORMKIT_DATA", raising=False)
    with pytest.raises(ProtocolError, match="--data-root DIR or set the environment variable NORMKIT_DATA"):
        llff()
    with pytest.raises(ProtocolError, match="is no folder"):
        data_root(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is truncated or damaged"),
        ("{}", "damaged .KeyError: 'camera_angle_x'"),
        ('{"camera_angle_x": 4, "frames": []}', "wanted camera_angle_x between 0 and pi"),
        ('{"camera_angle_x": 1, "frames": [{"file_path": "a", "transform_matrix": [[1]]}]}', "a 4x4 transform_matrix"),
    ],
)
def test_damaged_cameras(blender_root: Path, text: str, message: str) -> None:
    (blender_root / "nerf_synthetic" / "tiny" / "transforms_train.json").write_text(text)
    with pytest.raises(ProtocolError, match=message):
        blender(blender_root, "tiny")


def test_missing_picture_of_a_blender_scene(blender_root: Path) -> None:
    (blender_root / "nerf_synthetic" / "tiny" / "test" / "r_8.png").unlink()
    with pytest.raises(ProtocolError, match=r"r_8.png is missing; unpack the scene again"):
        blender(blender_root, "tiny")


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
