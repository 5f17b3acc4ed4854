"""Folders of records: known by what they hold, locked against a second writer, emptied of what is ours alone.

Replacing records begins with a note of what is wanted in their place, and is finished by whoever comes next if it is stopped:
no old run is ever taken for a new one. Each run goes in one step, renamed out of its place and then deleted.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from normkit.core.errors import RecordError
from normkit.lab import record
from normkit.lab.record import FLAG, OBJECT, fields, parse

CONFIG, RESULT, ENVIRONMENT, TIMING = "config.json", "result.json", "environment.json", "timing.json"
RUNS, FIGURES, CURVES = "runs", "figures", "tensorboard"
TOP = (RESULT, "result.md", "report.html", "cost.json", "sessions.json", ENVIRONMENT, CONFIG)
REPLACING, DISCARDED, LOCK, CHECKPOINT = "overwrite.json", ".discarded", ".lock", "checkpoint.pt"
OURS = {*TOP, RUNS, FIGURES, CURVES, REPLACING, DISCARDED}
# What a configuration of ours says, and no one else's of the same name; an earlier normkit kept comparisons and their runs apart.
COMPARISON = {"model", "data", "recipes", "seeds", "rates", "epochs", "batch_size", "optimizer", "device"}
EXPERIMENT = {"experiment", "epochs", "threads", "seeds"}
RUN = {"recipe", "rate", "seed", "data_sha256", "init_sha256", "order_sha256"}
MARK = b"normkit"  # in the head of a figure
WRITABLE = "make it writable, or choose another --output"
PAUSE = 1.0  # seconds between two looks at a folder that is in use


class InUseError(RecordError):
    """Another process holds the folder."""


def make(folder: Path) -> None:
    """Makes a folder, if it is not there."""
    with _told(f"write {folder}", WRITABLE):
        _check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder against a second process; the system lets go of it when this process ends, however it ends."""
    make(folder)
    with _told(f"write {folder}", WRITABLE):
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
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
    """Holds a folder as :func:`locked` does, but waits while another process holds it."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(folder))
                break
            except InUseError:
                time.sleep(PAUSE)
        yield


def check_ours(folder: Path) -> None:
    """Refuses a folder that holds someone else's files and no record of ours; a new or empty one is as good as ours."""
    _check_folder(folder)
    with _told(f"read {folder}", "choose another --output"):
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    names = {name for name in names if not name.endswith(record.TEMPORARY)} - {LOCK}
    alone = "so it is no record of normkit and is left alone; choose another --output"
    if CONFIG in names:
        config = _read(folder / CONFIG)
        if config is None and (REPLACING in names or any(_runs(folder))):
            record.read_json(folder / CONFIG)  # which says what is wrong with it
        if config is None or not (config.keys() >= COMPARISON or config.keys() >= EXPERIMENT):
            raise RecordError(f"{folder} holds a {CONFIG} of something else, {alone}")
    # A configuration that was lost is written again, where all that is there is known.
    elif names and not (REPLACING in names or (names <= OURS and any(_runs(folder)))):
        raise RecordError(f"{folder} holds {', '.join(sorted(names)[:3])} but no {CONFIG}, {alone}")


def replace(folder: Path, wanted: Mapping[str, Any], overwrite: bool) -> bool:
    """Removes the records of a folder that is held, where that is asked for or was begun and stopped.

    What was begun with the same configuration goes on: a command that replaces records can be stopped and given again.
    Tells whether the records that are there now were begun to replace others.
    """
    path = folder / REPLACING
    note = record.read_json(path, fields(wanted=OBJECT, removed=FLAG)) if path.exists() else None
    if note is not None and not note["removed"]:
        empty(folder)
        note["removed"] = True
        record.write_json(path, note)
    if overwrite and (note is None or note["wanted"] != wanted):
        if (folder / RUNS).is_symlink():
            raise RecordError(
                f"{folder / RUNS} is a symbolic link; what it leads to is left alone. Remove the link, or choose another --output"
            )
        note = {"wanted": dict(wanted), "removed": False}
        record.write_json(path, note)
        empty(folder)
        record.write_json(path, {**note, "removed": True})
    return note is not None


def empty(folder: Path) -> None:
    """Removes the records of a folder that is held, and nothing else."""
    runs = list(_runs(folder))
    with ExitStack() as held:
        for run in runs:
            if (run / LOCK).exists():
                held.enter_context(locked(run))
        for run in runs:
            curves = folder / CURVES / run.relative_to(folder / RUNS)
            for path in curves.glob("events.out.tfevents.*"):
                remove(path)
            discard(folder, run)
    for path in (folder / FIGURES).glob("*.*"):
        if path.suffix in (".png", ".svg", ".gif") and not path.is_symlink() and MARK in _head(path):
            remove(path)
    for name in (RUNS, CURVES, FIGURES):
        # Folders that hold nothing any more; a link stays.
        for place, _, _ in os.walk(folder / name, topdown=False):
            with suppress(OSError):
                os.rmdir(place)
    for name in TOP:
        remove(folder / name)


def discard(folder: Path, run: Path) -> None:
    """Removes the folder of a run: it leaves its place whole, and is deleted then."""
    grave = folder / DISCARDED
    with _told(f"remove {run}", "make the folder writable"):
        if grave.exists():
            shutil.rmtree(grave)  # of one who was stopped here
        if run.exists():
            grave.mkdir()
            os.rename(run, grave / "run")
            shutil.rmtree(grave)


def remove(path: Path) -> None:
    """Removes a file that is no longer needed, if it is there."""
    with _told(f"remove {path}", "make the folder writable"):
        if path.exists() or path.is_symlink():  # or a disk that is only read would refuse
            path.unlink(missing_ok=True)


def _runs(folder: Path) -> Iterator[Path]:
    """Folders of runs, each known by its configuration; links are not followed."""
    for place, names, files in os.walk(folder / RUNS):
        config = (_read(Path(place) / CONFIG) if CONFIG in files else None) or {}
        job = config.get("function")
        if config.keys() >= RUN or (isinstance(job, str) and re.fullmatch(r"[\w.]+:[\w.<>]+", job)):
            names.clear()  # what lies in it is of the run
            yield Path(place)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = parse(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RecordError(f"{folder} is a file, not a folder; choose another --output")


@contextmanager
def _told(what: str, cure: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(f"cannot {what}: {error.strerror or error}; {cure}") from error
