"""Image files as a data set: the central square of each, as bytes."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normkit.core.errors import ProtocolError

# Part of the shorter side that is looked at: 224 of 256 pixels, as is usual for ImageNet.
CENTRE = 0.875


class ImageFiles:
    """A map-style dataset of image files: the central square of each, resized, as bytes.

    Several are read by several threads: the decoders work outside Python's lock.

    A sample is ``(3, size, size)`` uint8 and an integer.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, size: int) -> None:
        self.paths, self.labels, self.size = list(paths), labels.tolist(), size

    def __len__(self) -> int:
        """Counts the files."""
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Reads one."""
        return read_square(self.paths[row], self.size), self.labels[row]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Reads several."""
        with ThreadPoolExecutor(_threads()) as pool:
            return list(pool.map(self.__getitem__, rows))

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Reads several into one tensor ``(n, 3, size, size)``."""
        pixels = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor(_threads()) as pool:
            for place, (image, _) in enumerate(pool.map(self.__getitem__, rows)):
                pixels[place] = image
        return pixels


def read_square(path: Path, size: int) -> Tensor:
    """Reads the central square of an image, 7/8 of its shorter side, resized with antialiasing.

    Gives ``(3, size, size)`` uint8.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (size, size))  # a JPEG is decoded at the least resolution that serves
            image = opened.convert("RGB")
        side = CENTRE * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0))
    except FileNotFoundError:
        raise ProtocolError(f"{path} is gone; begin again, so that the folders are listed again") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ProtocolError(
            f"{path} can't be read as an image ({str(error)[:120]}); it is truncated or damaged: replace or delete it"
        ) from error
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _threads() -> int:
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    return min(32, len(allowed(0)) if allowed else os.cpu_count() or 1)
