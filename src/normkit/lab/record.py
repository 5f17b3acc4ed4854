"""Folders of records: written atomically, read with care, locked against a second writer.

A file is complete or absent: it is written beside its place under a temporary name, flushed to the disk and renamed. So
a process killed at any instant leaves the last complete version of each file.
"""

import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from normkit.core.errors import RecordError

TEMPORARY = ".part"
LOCK = ".lock"
PAUSE = 1.0  # seconds between two looks at a folder that is in use


class InUseError(RecordError):
    """Another process holds the folder."""


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Args:
        path: where; the folder is made when missing.
        content: what.

    Raises:
        RecordError: the disk is full or the place not writable; an earlier version of the file is kept.
    """
    part = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise RecordError(
            f"cannot write {path}: {error.strerror or error}; what was written before is kept. Free space or make "
            "the folder writable and give the same command to go on, or choose another --output"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    write_bytes(path, "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows).encode())


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors and plain values as torch saves them, atomically."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_json(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: what to read.
        keys: that must be there.

    Raises:
        RecordError: the file can't be read, is no JSON object, or lacks a key.
    """
    with _reading(path):
        value = json.loads(path.read_bytes())
        _check_keys(value, keys)
    return value


def read_lines(path: Path, keys: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Reads one JSON object a line.

    Args:
        path: what to read.
        keys: that must be in each.

    Raises:
        RecordError: the file can't be read, or a line is no JSON object or lacks a key.
    """
    keys = tuple(keys)
    with _reading(path):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for row in rows:
            _check_keys(row, keys)
    return rows


def read_checkpoint(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Reads what :func:`write_checkpoint` wrote; runs no code that the file may hold.

    Args:
        path: what to read.
        keys: that must be there.

    Raises:
        RecordError: the file can't be read, is truncated or damaged, or lacks a key.
    """
    import torch

    with _reading(path):
        content = io.BytesIO(path.read_bytes())
        # torch does not look at the checksums that it wrote.
        if bad := zipfile.ZipFile(content).testzip():
            raise ValueError(f"{bad} fails its checksum")
        content.seek(0)
        value = torch.load(content, map_location="cpu", weights_only=True)
        _check_keys(value, keys)
    return value


def check_config(path: Path, config: Mapping[str, Any], cure: str) -> None:
    """Writes a configuration, or checks that the one already there is the same.

    Args:
        path: of the configuration's file.
        config: what is wanted.
        cure: ends the message.

    Raises:
        RecordError: it is of something else, or a key differs.
    """
    wanted = json.loads(json.dumps(config))
    if not path.exists():
        write_json(path, wanted)
        return
    found = read_json(path)
    if found.get("experiment") != wanted.get("experiment"):
        raise RecordError(f"{path.parent} holds records of {_subject(found)}, not of {_subject(wanted)}; {cure}")
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        if found.get(key) != wanted.get(key):
            raise RecordError(
                f"{path.parent} holds records of another configuration: {key} is {json.dumps(found.get(key))} there, "
                f"{json.dumps(wanted.get(key))} now; {cure}"
            )


def make(folder: Path) -> None:
    """Makes a folder, if it is not there.

    Raises:
        RecordError: it is a file, or can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise RecordError(f"{folder} is a file, not a folder; choose another --output") from None
    except OSError as error:
        raise _unwritable(folder, error) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder against a second process; the system lets go of it when this process ends, however it ends.

    Args:
        folder: what to hold; made when missing.

    Raises:
        InUseError: another process holds it.
        RecordError: it is not writable.
    """
    make(folder)
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            import fcntl
        except ImportError:  # Windows has no flock; two writers there are the user's own care.
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InUseError(
                f"{folder} is in use by another process; wait for it, or choose another --output"
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def waited_for(folder: Path) -> Iterator[None]:
    """Holds a folder as :func:`locked` does, but waits while another process holds it.

    Args:
        folder: what to hold; made when missing.

    Raises:
        RecordError: it is not writable.
    """
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(folder))
                break
            except InUseError:
                time.sleep(PAUSE)
        yield


def prepare(folder: Path, marker: str, ours: Iterable[str], overwrite: bool) -> None:
    """Makes a folder ready for records: new, one of ours to go on with, or emptied of ours.

    Args:
        folder: what to prepare.
        marker: the file by which a folder of ours is known.
        ours: names in the folder that `overwrite` removes.
        overwrite: remove an earlier record.

    Raises:
        RecordError: the folder holds something else, or can't be written.
    """
    try:
        names = {entry.name for entry in folder.iterdir() if not entry.name.endswith(TEMPORARY)} - {LOCK}
        if names and marker not in names:
            raise RecordError(
                f"{folder} holds {', '.join(sorted(names)[:3])} but no {marker}, so it is no record of normkit and is "
                "left alone; choose another --output"
            )
        for name in ours if overwrite else ():
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(f"cannot prepare {folder}: {error.strerror or error}; choose another --output") from error


def remove(path: Path) -> None:
    """Removes a file that is no longer needed, if it is there.

    Raises:
        RecordError: the folder is not writable.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(f"cannot remove {path}: {error.strerror or error}; make the folder writable") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        finish = "give the `normkit compare` command of this folder (again) to finish it"
        cure = _cure(path) if path.parent.name.startswith("seed=") else finish
        raise RecordError(f"{path} is missing; {cure}") from None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        # torch.load raises RuntimeError, EOFError, UnpicklingError, KeyError and more on a damaged file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecordError(f"{path} is damaged ({reason}); {_cure(path)}") from error


def _check_keys(value: Any, keys: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"it holds a {type(value).__name__}, not an object")
    if missing := [key for key in keys if key not in value]:
        raise KeyError(f"{missing[0]} is not in it")


def _subject(config: Mapping[str, Any]) -> str:
    # A comparison's configuration names no experiment.
    return f"the experiment {config['experiment']}" if "experiment" in config else "a comparison"


def _unwritable(folder: Path, error: OSError) -> RecordError:
    return RecordError(
        f"cannot write {folder}: {error.strerror or error}; make it writable, or choose another --output"
    )


def _cure(path: Path) -> str:
    # A run lies in runs/<recipe>/rate=<rate>/seed=<seed>; what is above it stands for the whole comparison.
    if path.parent.name.startswith("seed="):
        return f"remove the folder {path.parent} and give the same command: only this run is trained again"
    return f"restore it, or remove {path} and give the same command: finished runs are kept"
