"""Photographs of one scene with the cameras that took them, and the rays of their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normkit.core.errors import ProtocolError
from normkit.lab.data.root import data_root, reading


@dataclass(frozen=True)
class Rays:
    """Half-lines ``origin + t direction`` with `t` from near to far, and the unit direction in which each one looks.

    In normalized device coordinates `origins` and `directions` are bent, `looks` is not.
    """

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
    """Sends a ray through the centre of every pixel of a pinhole camera.

        direction = R [(i + 1/2 - width/2) / f_x, -(j + 1/2 - height/2) / f_y, -1],   origin = the camera's position

    The pose ``(3, 4)`` has the camera's right, up, backward and position as columns. Origins and directions are
    ``(height * width, 3)``; directions reach the plane at distance 1.
    """
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


def scene_folder(root: Path | None, collection: str, scene: str, cure: str) -> Path:
    """Finds the folder of a scene in a collection as it was published."""
    folder = data_root(root) / collection / scene
    if not folder.is_dir():
        raise ProtocolError(f"{folder} is missing; {cure}")
    return folder


def read_image(path: Path, reduce: int = 1) -> np.ndarray:
    """Reads a picture ``(height, width, 3 or 4)`` from 0 to 1, and averages squares of `reduce` pixels per side.

    A rest at the right and lower edge that fills no square is spread over the others.
    """
    from PIL import Image

    with reading(path, "unpack the scene again"), Image.open(path) as file:
        image = file.convert("RGBA" if "A" in file.getbands() else "RGB")
    if reduce > 1:
        size = image.width // reduce, image.height // reduce
        if min(size) < 1:
            raise ProtocolError(f"{path} is {image.width}x{image.height} pixels; reduce={reduce} would leave nothing")
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def stack_images(paths: list[Path], reduce: int = 1) -> Tensor:
    """Reads pictures of one size into ``(n, height, width, channels)``."""
    images = [read_image(path, reduce) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ProtocolError(
                f"{path} has shape {image.shape}, {paths[0].name} has {images[0].shape}; wanted pictures of one size and kind"
            )
    return torch.from_numpy(np.stack(images))
