"""Scenes photographed from the front by hand, in the layout of Local Light Field Fusion."""

from pathlib import Path

import numpy as np
import torch

from normkit.core.errors import ProtocolError
from normkit.lab.data.root import reading
from normkit.lab.data.scene import Scene, scene_folder, stack_images

SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
FOLDER = "nerf_llff_data"
FACTOR = 8  # times that the publishers downscaled the pictures which are read
HOLD = 8  # every 8th view is held out
_ROOM = 0.75  # the nearest point lies at 1 / 0.75 before the mean camera, safely behind the near plane at 1
_ROUNDING = 1e-2  # of axes, which are of length 1
_CURE = (
    f"unpack nerf_llff_data.zip of the NeRF authors (https://www.matthewtancik.com/nerf) so that DATA_ROOT/{FOLDER}/<scene> "
    "holds images_8 and poses_bounds.npy, and give --data-root DATA_ROOT"
)


def llff(root: Path | None = None, scene: str = "fern", reduce: int = 1) -> Scene:
    """Reads a forward-facing scene: photographs, poses and bounds; every 8th view is held out; rays are in NDC.

    Poses are recentred on their mean and scaled so that the nearest bound lies at 4/3. `reduce` averages squares of that
    many pixels per side.

    Reference: Mildenhall et al. 2019, Local light field fusion, https://arxiv.org/abs/1905.00889
    """
    folder = scene_folder(root, FOLDER, scene, _CURE)
    rows = _read_poses(folder / "poses_bounds.npy")
    pictures = folder / f"images_{FACTOR}"
    paths = sorted(path for path in pictures.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise ProtocolError(f"{pictures} holds no pictures; {_CURE}")
    if len(paths) != len(rows):
        raise ProtocolError(
            f"{pictures} holds {len(paths)} pictures, poses_bounds.npy {len(rows)} poses; wanted one each; {_CURE}"
        )
    images = stack_images(paths, reduce)[..., :3]
    cameras, bounds = rows[:, :15].reshape(-1, 3, 5), rows[:, 15:]
    high, wide, focal = cameras[0, :, 4]
    # The file's columns are down, right and backward; ours right, up and backward.
    poses = np.concatenate([cameras[:, :, 1:2], -cameras[:, :, 0:1], cameras[:, :, 2:4]], axis=2)
    poses[:, :, 3] /= bounds.min() * _ROOM
    count, height, width, _ = images.shape
    test = tuple(range(0, count, HOLD))
    return Scene(
        name=scene,
        images=images,
        poses=torch.from_numpy(recentre(poses).astype(np.float32)),
        focal=(float(focal * width / wide), float(focal * height / high)),
        train=tuple(view for view in range(count) if view not in test),
        test=test,
        near=0.0,
        far=1.0,
        ndc=True,
    )


def recentre(poses: np.ndarray) -> np.ndarray:
    """Moves the world so that the mean camera sits at the origin, looks along -z and has y above it.

    The mean camera looks back along the sum of the backward axes; its up is the part of the summed up axes across that.
    """
    back = _unit(poses[:, :, 2].sum(0))
    right = _unit(np.cross(poses[:, :, 1].sum(0), back))
    rotation = np.stack([right, np.cross(back, right), back], axis=1)
    turned = rotation.T @ poses
    turned[:, :, 3] -= rotation.T @ poses[:, :, 3].mean(0)
    return turned


def _read_poses(path: Path) -> np.ndarray:
    with reading(path, _CURE):
        rows = np.load(path, allow_pickle=False)
    if fault := _fault(rows):
        raise ProtocolError(f"{path} holds {fault}; {_CURE}")
    return rows.astype(np.float64)


def _fault(rows: np.ndarray) -> str:
    numbers = np.issubdtype(rows.dtype, np.number) and np.isrealobj(rows)
    if not numbers or rows.ndim != 2 or rows.shape[1] != 17 or not np.isfinite(rows).all():
        return f"an array {rows.shape}; wanted finite numbers (views, 17)"
    if len(rows) < 2:
        return f"an array {rows.shape}; wanted two views at least, one to learn from and one held out"
    if not (rows[:, 15:] > 0).all():
        return "a bound that is not above 0"
    cameras = rows[:, :15].reshape(-1, 3, 5)
    axes = cameras[:, :, :3]
    if not (cameras[:, :, 4] > 0).all():
        return "a height, width or focal length that is not above 0"
    unlike = np.abs(axes.swapaxes(1, 2) @ axes - np.eye(3)).max((1, 2))
    if unlike.max() > _ROUNDING or np.linalg.det(axes).min() < 0:
        return "a camera whose axes are not at right angles, of length 1 and right-handed"
    down, back = axes[:, :, 0].mean(0), axes[:, :, 2].mean(0)
    if (axes[:, :, 2] @ back).min() <= 0 or np.linalg.norm(np.cross(down, back)) < _ROUNDING:
        return "cameras that look different ways; wanted a scene photographed from the front, upright"
    return ""


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
