"""CIFAR-10 and CIFAR-100 in their published Python layout."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.core.errors import OptionError, ProtocolError
from normkit.lab.data.augment import FlipAndCrop, Standardize
from normkit.lab.data.download import Archive
from normkit.lab.data.download import download as fetch
from normkit.lab.data.pickled import read_pickle
from normkit.lab.data.root import data_root
from normkit.lab.data.split import Data, Split, hold_out, subset

# Part of the published training images that is held out to choose learning rates: 5,000 of 50,000.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Published:
    """One of the two data sets as it was published."""

    name: str
    archive: Archive  # where it comes from
    train: dict[str, str]  # files of training images, with their MD5 sums
    test: dict[str, str]  # files of test images, likewise
    labels: str  # the key of the labels in each
    classes: int  # how many


CIFAR10 = Published(
    "CIFAR-10",
    Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10-batches-py",
    ),
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    labels="labels",
    classes=10,
)
CIFAR100 = Published(
    "CIFAR-100",
    Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        "cifar-100-python",
    ),
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    labels="fine_labels",
    classes=100,
)
# By the built-in name of the lab.
PUBLISHED = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def download_missing(name: str, root: Path | str | None = None) -> None:
    """Downloads a data set where its files are missing; nothing for one that comes with a package or must be fetched by hand."""
    if name in PUBLISHED:
        _folder(PUBLISHED[name], root, wanted=True)


def source(names: Iterable[str], root: Path | str | None = None) -> str:
    """Says which data sets are not the published files; nothing where all are, or for another set than CIFAR."""
    known = [PUBLISHED[name] for name in dict.fromkeys(names) if name in PUBLISHED]
    changed = []
    for published in known:
        folder = _place(published, data_root(root))
        sums = {**published.train, **published.test}.items()
        if any(
            hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest() != wanted
            for file, wanted in sums
        ):
            changed.append(published.name)
    return f"Not the published files of {' and '.join(changed)}: their MD5 sums differ." if changed else ""


def cifar10(
    root: Path | str | None = None,
    *,
    train: int | None = None,
    val: int | None = None,
    test: int | None = None,
    augment: bool = True,
    download: bool = False,
    published: Published | None = None,
) -> Data:
    """Reads CIFAR-10: 60,000 photographs of 32x32 pixels and 10 classes; 45,000 train, 5,000 val, 10,000 test.

    Val is held out of the published training images, stratified, always the same ones. Pixels are bytes in memory; in a
    batch they are standardized by each channel's mean and deviation over the train split. Training batches are flipped
    and cropped: a rectangle of 0.8 to 1 of the area and 0.9 to 1.1 of the shape, resized to 32x32. `train`, `val` and `test`
    are how many samples of each, stratified; `val` is a ninth of `train` unless given. Inputs of a batch are float32
    ``(n, 3, 32, 32)``; `download` fetches the published archive (163 MB) into `root` where files are missing.

    Reference: Krizhevsky 2009, Learning multiple layers of features from tiny images, https://www.cs.toronto.edu/~kriz/cifar.html
    """
    published = published or CIFAR10
    folder = _folder(published, root, download)
    images, labels = _read(published, folder, published.train)
    tested, test_labels = _read(published, folder, published.test)
    # What is parted are row numbers: images are copied once, when it is known which.
    rest, held = hold_out(Split(labels, torch.arange(len(labels))), HELD_OUT)
    whole = {"train": rest, "val": held, "test": Split(test_labels, torch.arange(len(test_labels)))}
    if train is not None and val is None:
        val = max(published.classes, round(train * len(held) / len(rest)))
    counts = {"train": train, "val": val, "test": test}
    rows = {key: _some(published, key, split, counts[key]) for key, split in whole.items()}
    pixels = {key: (tested if key == "test" else images)[torch.as_tensor(rows[key].inputs)] for key in rows}
    prepare = Standardize.of(pixels["train"])
    splits = (Split(rows[key].targets, pixels[key], prepare=prepare) for key in rows)
    return Data(*splits, augment=FlipAndCrop() if augment else None)


def cifar100(root: Path | str | None = None, **options: Any) -> Data:
    """Reads CIFAR-100: as :func:`cifar10`, with its options, of 100 classes (the fine labels), from ``cifar-100-python``."""
    return cifar10(root, published=CIFAR100, **options)


def _some(published: Published, key: str, split: Split, count: int | None) -> Split:
    if count is None:
        return split
    if not published.classes <= count <= len(split):
        raise OptionError(
            f"{key} is {count}; wanted from {published.classes} (one of each class) to {len(split)}, "
            f"the {key} split of {published.name}"
        )
    return subset(split, count)


def _place(published: Published, base: Path) -> Path:
    # The folder itself is as good as the one that holds it.
    return base if base.name == published.archive.folder else base / published.archive.folder


def _folder(published: Published, root: Path | str | None, wanted: bool) -> Path:
    folder = _place(published, data_root(root, make=wanted))
    missing = [file for file in (*published.train, *published.test) if not (folder / file).is_file()]
    if missing and wanted:
        fetch(published.archive, folder.parent)
    elif missing:
        raise ProtocolError(
            f"{folder / missing[0]} is missing; download {published.name} (--download), or fetch {published.archive.url} "
            f"by hand and unpack it in {folder.parent}"
        )
    return folder


def _read(published: Published, folder: Path, names: Iterable[str]) -> tuple[Tensor, Tensor]:
    cure = f"delete {folder} and download {published.name} again (--download), or unpack {published.archive.name} again"
    images, labels = [], []
    for name in names:
        found = read_pickle(folder / name, cure)
        data, given = found.get("data"), found.get(published.labels)
        if fault := _fault(published, data, given):
            raise ProtocolError(f"{folder / name} is damaged or of another data set: {fault}; {cure}")
        images.append(data)
        labels.append(np.asarray(given, dtype=np.int64))
    return torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32), torch.from_numpy(np.concatenate(labels))


def _fault(published: Published, data: Any, labels: Any) -> str:
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
        return f"data is {got}; wanted bytes (n, 3072)"
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        return f"{published.labels} is a {type(labels).__name__}; wanted a list of integers"
    if len(labels) != len(data) or not labels:
        return f"{len(data)} images and {len(labels)} labels; wanted as many, and at least one"
    if min(labels) < 0 or max(labels) >= published.classes:
        return f"labels from {min(labels)} to {max(labels)}; wanted from 0 to {published.classes - 1}"
    return ""
