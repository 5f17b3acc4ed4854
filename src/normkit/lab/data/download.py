"""Published archives, checked before anything is unpacked."""

import hashlib
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from normkit.core.errors import ProtocolError

TIMEOUT = 60.0  # seconds without a byte
_PIECE = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A compressed tar file on the network."""

    url: str
    sha256: str  # of the whole file
    folder: str  # the one folder that it holds

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def download(archive: Archive, root: Path) -> None:
    """Fetches an archive and unpacks its folder under `root`; an archive that lies there already is used."""
    path, by_hand = root / archive.name, f"or fetch {archive.url} by hand and unpack it in {root}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not (path.is_file() and _sha256(path) == archive.sha256):
            _fetch(archive, path, by_hand)
        # Beside its place first, so that a file there is either complete or absent.
        with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as space:
            with tarfile.open(path) as tar:
                tar.extractall(space, filter="data")
            if not (Path(space) / archive.folder).is_dir():
                raise ProtocolError(f"{path} holds no folder {archive.folder}; delete it and download again")
            (root / archive.folder).mkdir(exist_ok=True)
            for found in (Path(space) / archive.folder).iterdir():
                found.replace(root / archive.folder / found.name)
    except (tarfile.TarError, EOFError) as error:
        raise ProtocolError(f"{path} can't be unpacked ({error}); delete it and download again") from error
    except OSError as error:
        reason = error.strerror or error
        raise ProtocolError(f"cannot write under {root}: {reason}; make room or make it writable, {by_hand}") from error


def _fetch(archive: Archive, path: Path, by_hand: str) -> None:
    part, digest, size = path.with_name(path.name + ".part"), hashlib.sha256(), 0
    try:
        with open(part, "wb") as file:
            for piece in _pieces(archive, by_hand):
                file.write(piece)
                digest.update(piece)
                size += len(piece)
        if digest.hexdigest() != archive.sha256:
            raise ProtocolError(
                f"{archive.url} gave {size} bytes with SHA-256 {digest.hexdigest()[:16]}..., not the published file with "
                f"{archive.sha256[:16]}...; they are thrown away; try again, {by_hand}"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _pieces(archive: Archive, by_hand: str) -> Iterator[bytes]:
    print(f"fetching {archive.url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(archive.url, timeout=TIMEOUT) as answer:
            while piece := answer.read(_PIECE):
                yield piece
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ProtocolError(
            f"cannot fetch {archive.url}: {reason}; look at the network and try again, {by_hand}"
        ) from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
