"""Small data sets in the layouts in which large ones are published."""

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


class Python2(pickle._Pickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Writes byte strings as Python 2 did, with which the published files were made."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def write_pickle(path: Path, value: Any, *, python2: bool = True) -> None:
    if not python2:
        path.write_bytes(pickle.dumps(value, protocol=2))
        return
    with open(path, "wb") as file:
        Python2(file, protocol=2).dump(value)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def batch(labels: np.ndarray, classes: int, seed: int) -> dict[bytes, Any]:
    """One file: noise whose red is brighter with the label, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 128, (len(labels), 3, 1024), dtype=np.uint8)
    data[:, 0] += (labels * 127 // (classes - 1)).astype(np.uint8)[:, None]
    key = b"labels" if classes == 10 else b"fine_labels"
    names = [f"image_{place}.png".encode() for place in range(len(labels))]
    return {b"batch_label": b"a batch", key: labels.tolist(), b"data": data.reshape(-1, 3072), b"filenames": names}


def write_cifar(root: Path, classes: int = 10, each: int = 20, *, python2: bool = True) -> Path:
    """`each` training images a class in all, and half as many to test, in shuffled order."""
    folder = root / FOLDERS[classes]
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    train, test = (rng.permutation(np.repeat(np.arange(classes), count)) for count in (each, each // 2))
    parts = {f"data_batch_{k + 1}": part for k, part in enumerate(np.array_split(train, 5))} if classes == 10 else {}
    parts = {**parts, "test_batch": test} if classes == 10 else {"train": train, "test": test}
    for seed, (name, labels) in enumerate(parts.items()):
        write_pickle(folder / name, batch(labels, classes, seed), python2=python2)
    return folder


def write_images(folder: Path, classes: int = 3, each: int = 4, parts: tuple[str, ...] = ("train", "val")) -> Path:
    """JPEG and PNG photographs of several sizes, each of one colour with a frame of another."""
    for part in parts:
        for label in range(classes):
            place = folder / part / f"n{label:08d}"
            place.mkdir(parents=True)
            for number in range(each):
                image = Image.new("RGB", (40 + 8 * number, 32 + 4 * label), (255, 255, 255))
                image.paste((80 * label, 40, 200 - 20 * number), (2, 2, image.width - 2, image.height - 2))
                image.save(place / f"{number}.{'png' if number % 2 else 'JPEG'}")
    return folder
