"""Rendered scenes seen from all around, in the layout of the NeRF authors' Blender export."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from normkit.core.errors import ProtocolError
from normkit.lab.data.root import reading
from normkit.lab.data.scene import Scene, scene_folder, stack_images

FOLDER = "nerf_synthetic"
EVERY = 8  # of as many test views one is read, as published
_CURE = (
    f"unpack nerf_synthetic.zip of the NeRF authors (https://www.matthewtancik.com/nerf) so that DATA_ROOT/{FOLDER}/<scene> "
    "holds transforms_train.json and its pictures, and give --data-root DATA_ROOT"
)


def blender(root: Path | None = None, scene: str = "lego", reduce: int = 2) -> Scene:
    """Reads a scene with cameras on a sphere: RGBA pictures laid on white, rays from 2 to 6 in world coordinates.

    `reduce` averages squares of that many pixels per side: 800 pixels to 400, as published.

    Reference: Mildenhall et al. 2020, NeRF, https://arxiv.org/abs/2003.08934
    """
    folder = scene_folder(root, FOLDER, scene, _CURE)
    learn, judge = (_read_cameras(folder / f"transforms_{part}.json") for part in ("train", "test"))
    frames = [*learn["frames"], *judge["frames"][::EVERY]]
    images = stack_images([folder / f"{frame['file_path']}.png" for frame in frames], reduce)
    if images.shape[-1] == 4:
        images = images[..., :3] * images[..., 3:] + (1 - images[..., 3:])
    focal = 0.5 * images.shape[2] / math.tan(0.5 * learn["camera_angle_x"])
    poses = torch.tensor([frame["transform_matrix"] for frame in frames], dtype=torch.float32)[:, :3]
    views = range(len(frames))
    return Scene(
        name=scene,
        images=images,
        poses=poses,
        focal=(focal, focal),
        train=tuple(views[: len(learn["frames"])]),
        test=tuple(views[len(learn["frames"]) :]),
        near=2.0,
        far=6.0,
        background=1.0,
    )


def _read_cameras(path: Path) -> dict[str, Any]:
    with reading(path, _CURE):
        cameras = json.loads(path.read_text("utf-8"))
        fits = 0 < float(cameras["camera_angle_x"]) < math.pi and len(cameras["frames"]) > 0
        for frame in cameras["frames"]:
            matrix = torch.tensor(frame["transform_matrix"])
            fits &= isinstance(frame["file_path"], str) and matrix.shape == (4, 4) and bool(matrix.isfinite().all())
    if not fits:
        raise ProtocolError(
            f"{path}: wanted camera_angle_x between 0 and pi and frames, each with file_path and a 4x4 transform_matrix; {_CURE}"
        )
    return cameras
