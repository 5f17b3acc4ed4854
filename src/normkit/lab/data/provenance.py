"""Whether files of CIFAR are those that were published, by their MD5 sums."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from normkit.lab.data.cifar import PUBLISHED
from normkit.lab.data.root import data_root

# From https://www.cs.toronto.edu/~kriz/cifar.html's archives, file by file.
MD5 = {
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
    "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}


def source(names: Iterable[str], root: Path | str | None = None) -> str:
    """Says which data sets are not the published files; nothing where all are.

    >>> source(["digits"])
    ''
    """
    changed = [
        PUBLISHED[name].name for name in dict.fromkeys(names) if name in PUBLISHED and not _published(name, root)
    ]
    if not changed:
        return ""
    return f"Not the published files of {' and '.join(changed)}: their MD5 sums differ."


def _published(name: str, root: Path | str | None) -> bool:
    known = PUBLISHED[name]
    base = data_root(root)
    folder = base if base.name == known.archive.folder else base / known.archive.folder
    return all(
        hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()
        == MD5[f"{known.archive.folder}/{file}"]
        for file in (*known.train, *known.test)
    )
