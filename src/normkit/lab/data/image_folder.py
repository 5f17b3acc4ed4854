"""Photographs in folders, one folder a class, as ImageNet is laid out once it is unpacked."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normkit.core.errors import OptionError, ProtocolError
from normkit.lab.data.augment import FlipAndCrop
from normkit.lab.data.root import data_root, reading
from normkit.lab.data.split import Data, Split, hold_out, subset
from normkit.lab.data.standardize import Standardize

PARTS = ("train", "val", "test")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
HELD_OUT = 0.1  # part of train that is held out for a folder that is missing
MEASURED = 2048  # training images whose pixels are measured where they are not all in memory
# Part of the shorter side that is looked at: 224 of 256 pixels, as is usual for ImageNet.
CENTRE = 0.875
AUGMENT = FlipAndCrop(scale=(0.25, 1.0), ratio=(3 / 4, 4 / 3))


def imagefolder(
    root: Path | str | None = None,
    *,
    size: int = 224,
    classes: int | None = None,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    augment: bool = True,
    memory: float = 2.0,
) -> Data:
    """Reads images from ``train/CLASS/`` and ``val/CLASS/`` or ``test/CLASS/``, such as ImageNet's.

    Classes are the folders of train, in alphabetical order. With both ``val`` and ``test`` they are what they are called.
    With one of them, which of ImageNet is ``val``, it is the test split; val is a tenth of train, at most as many as
    test. With neither, a tenth of train each. What is held out is stratified, always the same.

    Of an image the central square of 7/8 of the shorter side is taken and resized. Training batches are flipped and
    cropped: a rectangle of 1/4 to 1 of that square's area, and of 3/4 to 4/3 of its shape. Pixels are standardized by each
    channel's mean and deviation over the train split (over 2,048 of its images, where they are not in memory).

    Args:
        root: the folder that holds ``train``, or the one in which a single folder does. Default: None, the environment
            variable ``NORMKIT_DATA``.
        size: height and width of the inputs. Default: 224.
        classes: only the first that many classes. Default: None, all.
        train: as many samples of train, stratified. Default: None, all.
        val: the same of val.
        test: the same of test.
        augment: flip and crop training batches. Default: True.
        memory: GiB; if all the images need no more, they are read once and held as bytes, else each time they are used.
            Default: 2.

    Shape:
        Inputs of a batch ``(n, 3, size, size)`` float32, targets ``(n,)`` int64.

    Raises:
        OptionError: `size`, `classes` or a subset is outside its range.
        ProtocolError: a folder or file is missing, empty, or not what it should be.

    Reference: Deng et al. 2009, ImageNet: a large-scale hierarchical image database, https://www.image-net.org
    """
    if size < 1:
        raise OptionError(f"size is {size}; wanted at least 1 pixel")
    folder = _folder(data_root(root))
    names = _subfolders(folder / "train")
    known = set(names)
    if classes is not None:
        if not 2 <= classes <= len(names):
            raise OptionError(f"classes is {classes}; wanted from 2 to {len(names)}, the folders of {folder / 'train'}")
        names = names[:classes]
    files: list[Path] = []
    found = {part: _list(folder / part, names, known, files) for part in PARTS if (folder / part).is_dir()}
    splits = _three(found)
    for part, count in {"train": train, "val": val, "test": test}.items():
        if count is not None:
            splits[part] = subset(splits[part], count)
    labels = torch.zeros(len(files), dtype=torch.long)
    for split in splits.values():
        labels[_rows(split)] = split.targets
    return Data(*_read(ImageFiles(files, labels, size), splits, memory), augment=AUGMENT if augment else None)


def _folder(root: Path) -> Path:
    if (root / "train").is_dir():
        return root
    inside = sorted(path.parent for path in root.glob("*/train") if path.is_dir())
    if len(inside) == 1:
        return inside[0]
    several = f"; there are {', '.join(path.name for path in inside)}: say which" if inside else ""
    raise ProtocolError(f"{root} holds no folder train{several}; wanted train/CLASS/*.jpg and val/CLASS/*.jpg in it")


def _subfolders(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ProtocolError(f"{folder} holds no folders; wanted one for each class, with its images")
    return names


def _list(folder: Path, names: list[str], known: set[str], files: list[Path]) -> Split:
    """The images of a part: their labels, and as inputs their places in `files`, to which they are added."""
    here = _subfolders(folder)
    if strange := sorted(set(here) - known):
        raise ProtocolError(
            f"{folder / strange[0]} is a class that {folder.parent / 'train'} does not have; wanted the same folders in both"
        )
    targets, before = [], len(files)
    for label, name in enumerate(names):
        if name not in here:
            continue
        images = _images(folder / name)
        if not images and folder.name == "train":
            raise ProtocolError(f"{folder / name} holds no images ({', '.join(ENDINGS)}); fill or delete it")
        files += images
        targets += [label] * len(images)
    return Split(torch.tensor(targets, dtype=torch.long), torch.arange(before, len(files)))


def _images(folder: Path) -> list[Path]:
    images = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(ENDINGS) and not entry.name.startswith(".") and entry.is_file():
                if not entry.stat().st_size:
                    raise ProtocolError(f"{entry.path} is empty; replace or delete it")
                images.append(Path(entry.path))
    return sorted(images)


def _three(found: dict[str, Split]) -> dict[str, Split]:
    train, val, test = (found.get(part) for part in PARTS)
    assert train is not None
    if val is not None and test is None:
        val, test = None, val
    share = HELD_OUT
    if test is None:
        train, test = hold_out(train, HELD_OUT, seed=1)
        share = HELD_OUT / (1 - HELD_OUT)
    if val is None:
        train, val = hold_out(train, share)
        if len(val) > len(test):
            val = subset(val, len(test))
    return {"train": train, "val": val, "test": test}


def _rows(split: Split) -> Tensor:
    return torch.as_tensor(split.inputs)


class ImageFiles:
    """A map-style dataset of image files: the central square of each, resized, as bytes.

    Several are read by several threads: the decoders work outside Python's lock. A sample is ``(3, size, size)`` uint8
    and an integer.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, size: int) -> None:
        self.paths, self.labels, self.size = list(paths), labels.tolist(), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return read_square(self.paths[row], self.size), self.labels[row]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.__getitem__, rows))

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Reads several into one tensor ``(n, 3, size, size)``."""
        pixels = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for place, (image, _) in enumerate(pool.map(self.__getitem__, rows)):
                pixels[place] = image
        return pixels


def read_square(path: Path, size: int) -> Tensor:
    """Reads the central square of an image, 7/8 of its shorter side, resized with antialiasing.

    Gives ``(3, size, size)`` uint8.
    """
    from PIL import Image

    with reading(path, "replace it, or delete it and begin again"):
        with Image.open(path) as opened:
            opened.draft("RGB", (size, size))  # a JPEG is decoded at the least resolution that serves
            image = opened.convert("RGB")
        side = CENTRE * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _read(source: ImageFiles, splits: dict[str, Split], memory: float) -> list[Split]:
    train = splits["train"]
    if sum(map(len, splits.values())) * 3 * source.size**2 <= memory * 2**30:
        pixels = {part: source.pixels(_rows(split).tolist()) for part, split in splits.items()}
        prepare = Standardize.of(pixels["train"])
        return [Split(split.targets, pixels[part], prepare=prepare) for part, split in splits.items()]
    some = subset(train, min(MEASURED, len(train)))
    prepare = Standardize.of(source.pixels(_rows(some).tolist()))
    return [Split(split.targets, source=source, rows=_rows(split), prepare=prepare) for split in splits.values()]
