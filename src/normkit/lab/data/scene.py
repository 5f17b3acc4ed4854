"""Photographs of a scene with the cameras that took them, the rays of their pixels, and the layouts that scenes come in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normkit.core.errors import ProtocolError
from normkit.lab.data.root import data_root, reading

SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
FOLDER = "nerf_llff_data"
FACTOR = 8  # times that the publishers downscaled the pictures which are read
HOLD = 8  # every 8th view is held out
_ROOM = 0.75  # the nearest point lies at 1 / 0.75 before the mean camera, safely behind the near plane at 1
_ROUNDING = 1e-2  # of axes, which are of length 1


@dataclass(frozen=True)
class Rays:
    """Half-lines ``origin + t direction``, `t` from near to far; NDC bends them, but not the direction each looks in."""

    origins: Tensor  # (n, 3)
    directions: Tensor  # (n, 3), of any length
    looks: Tensor  # (n, 3), unit vectors of the world
    near: float  # the first `t`
    far: float  # the last `t`

    def __len__(self) -> int:
        return len(self.origins)

    def take(self, index: Tensor | slice) -> Rays:
        return Rays(self.origins[index], self.directions[index], self.looks[index], self.near, self.far)

    def to(self, device: torch.device) -> Rays:
        parts = (self.origins.to(device), self.directions.to(device), self.looks.to(device))
        return Rays(*parts, self.near, self.far)


@dataclass(frozen=True)
class Scene:
    """Views of one scene, some to learn from and some held out."""

    name: str
    images: Tensor  # (n, height, width, 3), from 0 to 1
    poses: Tensor  # (n, 3, 4) camera to world; the columns are the camera's right, up, backward and position
    focal: tuple[float, float]  # in pixels, across and down
    train: tuple[int, ...]  # the views to learn from
    test: tuple[int, ...]  # the views held out
    near: float  # where rays begin, in the units of `t`
    far: float  # where rays end
    ndc: bool = False  # whether rays are given in normalized device coordinates, for scenes in front of the cameras
    background: float = 0.0  # the grey behind everything: 0 black, 1 white

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[1], self.images.shape[2]

    def rays(self, views: tuple[int, ...]) -> Rays:
        """Gives the rays of all pixels of some views, row by row; ``images[list(views)].reshape(-1, 3)`` are their colours."""
        origins, directions = zip(
            *(camera_rays(self.poses[view], *self.size, self.focal) for view in views), strict=True
        )
        start, along = torch.cat(origins), torch.cat(directions)
        looks = along / along.norm(dim=-1, keepdim=True)
        if self.ndc:
            start, along = to_ndc(start, along, *self.size, self.focal)
        return Rays(start, along, looks, self.near, self.far)

    def colours(self, views: tuple[int, ...]) -> Tensor:
        """Gives the colours ``(pixels, 3)`` of all pixels of some views."""
        return self.images[list(views)].reshape(-1, 3)


def camera_rays(pose: Tensor, height: int, width: int, focal: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Sends a ray through the centre of every pixel of a pinhole camera."""
    down, across = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x, y = (across - width / 2) / focal[0], -(down - height / 2) / focal[1]
    local = torch.stack([x, y, -torch.ones_like(x)], -1).reshape(-1, 3).to(pose.dtype)
    directions = local @ pose[:, :3].T
    return pose[:, 3].expand_as(directions), directions


def to_ndc(
    origins: Tensor, directions: Tensor, height: int, width: int, focal: tuple[float, float], near: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Bends rays so that the pyramid before a camera becomes a cube, and `t` from 0 to 1 goes from `near` to infinity.

        o' = (-2 f_x/W o_x/o_z, -2 f_y/H o_y/o_z, 1 + 2 n/o_z)
        d' = (-2 f_x/W (d_x/d_z - o_x/o_z), -2 f_y/H (d_y/d_z - o_y/o_z), -2 n/o_z),   o moved to the plane z = -n first

    The point at `t'` of the new ray is the projection of the one at ``t = n t' / (-d_z (1 - t'))`` past that plane of the
    old one, so that `t'` is linear in disparity. Origins and directions are ``(n, 3)``; the cameras look along -z, so
    that ``d_z < 0``.

    Reference: Mildenhall et al. 2020, NeRF, appendix C, https://arxiv.org/abs/2003.08934
    """
    reach = -(near + origins[:, 2:]) / directions[:, 2:]
    x, y, z = (origins + reach * directions).unbind(-1)
    along_x, along_y, along_z = directions.unbind(-1)
    wide, high = -2 * focal[0] / width, -2 * focal[1] / height
    start = torch.stack([wide * x / z, high * y / z, 1 + 2 * near / z], -1)
    along = torch.stack([wide * (along_x / along_z - x / z), high * (along_y / along_z - y / z), -2 * near / z], -1)
    return start, along


def read_image(path: Path, reduce: int = 1) -> np.ndarray:
    """Reads a picture ``(height, width, 3)`` from 0 to 1, and averages squares of `reduce` pixels per side."""
    from PIL import Image

    with reading(path, "unpack the scene again"), Image.open(path) as file:
        image = file.convert("RGB")
    if reduce > 1:
        size = image.width // reduce, image.height // reduce
        if min(size) < 1:
            raise ProtocolError(f"{path} is {image.width}x{image.height} pixels; reduce={reduce} would leave nothing")
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def stack_images(paths: list[Path], reduce: int = 1) -> Tensor:
    """Reads pictures of one size into ``(n, height, width, 3)``."""
    images = [read_image(path, reduce) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ProtocolError(
                f"{path} has shape {image.shape}, {paths[0].name} has {images[0].shape}; wanted pictures of one size and kind"
            )
    return torch.from_numpy(np.stack(images))


# x, y, z, radius, density, red, green, blue; no two meet.
_BALLS = torch.tensor(
    [
        [0.00, -0.05, 0.00, 0.55, 8.0, 0.85, 0.25, 0.20],
        [0.85, 0.10, 0.15, 0.28, 12.0, 0.20, 0.45, 0.85],
        [-0.80, -0.10, 0.35, 0.32, 12.0, 0.25, 0.70, 0.35],
        [0.10, 0.75, -0.20, 0.22, 16.0, 0.95, 0.80, 0.25],
        [-0.30, -0.15, -0.95, 0.30, 3.0, 0.55, 0.30, 0.75],
        [0.40, -0.45, 0.80, 0.20, 16.0, 0.95, 0.55, 0.15],
    ]
)


def spheres(size: int = 32, views: int = 24, hold: int = 8) -> Scene:
    """Six balls of even density on white, seen from cameras on a spiral about them; one of `hold` views is held out."""
    poses = torch.stack([_pose(view, views) for view in range(views)])
    test = tuple(range(0, views, hold))
    blank = Scene(
        name="spheres",
        images=torch.zeros(views, size, size, 3),
        poses=poses,
        focal=(1.3 * size, 1.3 * size),
        train=tuple(view for view in range(views) if view not in test),
        test=test,
        near=2.0,
        far=6.0,
        background=1.0,
    )
    colours = see(blank.rays(tuple(range(views))))
    return Scene(**{**vars(blank), "images": colours.reshape(views, size, size, 3)})


def see(rays: Rays, balls: Tensor = _BALLS) -> Tensor:
    """Computes what rays see of balls that do not meet, exactly.

        colour = sum_k T_k (1 - exp(-s_k l_k)) c_k + T background,   T_k = exp(-sum_{j before k} s_j l_j)

    with l_k the length of the ray within ball k. Balls ``(k, 8)`` have centre, radius, density and colour; rays, not in
    NDC, begin outside of all.
    """
    centre, radius, density, colour = balls[:, :3], balls[:, 3], balls[:, 4], balls[:, 5:]
    away = centre - rays.origins[:, None]
    along = (away * rays.looks[:, None]).sum(-1)
    half = (radius.square() - away.square().sum(-1) + along.square()).clamp_min(0).sqrt()
    thickness = torch.where(along > 0, 2 * half * density, 0.0)
    order = along.argsort(dim=-1)
    thickness, colours = thickness.gather(1, order), colour[order]
    before = thickness.cumsum(-1) - thickness
    weights = torch.exp(-before) * -torch.expm1(-thickness)
    return (weights[..., None] * colours).sum(1) + torch.exp(-thickness.sum(-1))[:, None]


def _pose(view: int, views: int) -> Tensor:
    turn, rise = 2.4 * view, math.radians(10 + 45 * view / max(1, views - 1))  # the golden angle spreads neighbours
    back = torch.tensor([math.cos(rise) * math.sin(turn), math.sin(rise), math.cos(rise) * math.cos(turn)])
    right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), back)
    right = right / right.norm()
    return torch.stack([right, torch.linalg.cross(back, right), back, 4 * back], dim=1)


_CURE = (
    f"unpack nerf_llff_data.zip of the NeRF authors (https://www.matthewtancik.com/nerf) so that DATA_ROOT/{FOLDER}/<scene> "
    "holds images_8 and poses_bounds.npy, and give --data-root DATA_ROOT"
)


def llff(root: Path | None = None, scene: str = "fern", reduce: int = 1) -> Scene:
    """Reads a forward-facing scene: photographs, poses and bounds; every 8th view is held out; rays are in NDC.

    Poses are recentred on their mean and scaled so that the nearest bound lies at 4/3. `reduce` averages squares of that
    many pixels per side (Mildenhall et al. 2019, Local light field fusion, https://arxiv.org/abs/1905.00889).
    """
    folder = data_root(root) / FOLDER / scene
    if not folder.is_dir():
        raise ProtocolError(f"{folder} is missing; {_CURE}")
    rows = _read_poses(folder / "poses_bounds.npy")
    pictures = folder / f"images_{FACTOR}"
    paths = sorted(path for path in pictures.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise ProtocolError(f"{pictures} holds no pictures; {_CURE}")
    if len(paths) != len(rows):
        raise ProtocolError(
            f"{pictures} holds {len(paths)} pictures, poses_bounds.npy {len(rows)} poses; wanted one each; {_CURE}"
        )
    images = stack_images(paths, reduce)
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
    """Moves the world so that the mean camera sits at the origin, looks along -z and has y above it."""
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
