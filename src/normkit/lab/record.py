"""Files of records: written whole or not at all, and read against what their values must be, whoever wrote them.

A file is complete or absent: it is written next to its place under a temporary name, flushed to the disk and renamed. So
a process killed at any instant leaves the last complete version of each file.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from normkit.core.errors import RecordError

# Says what is wrong with a value at a place, or None where it is as it must be.
Kind = Callable[[Any, str], str | None]
LARGEST = 1e300  # finite, and so are the sums of many
TEMPORARY = ".part"


def kind(name: str, good: Callable[[Any], bool]) -> Kind:
    """A kind of values."""

    def look(value: Any, place: str) -> str | None:
        return None if good(value) else f"{place or 'it'} is {_shown(value)}; wanted {name}"

    return look


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST


ANY: Kind = kind("any value", lambda value: True)
NUMBER: Kind = kind("a finite number", _is_number)
POSITIVE: Kind = kind("a number above 0", lambda value: _is_number(value) and value > 0)
COUNT: Kind = kind("a whole number from 0", lambda value: type(value) is int and 0 <= value < 2**63)
TEXT: Kind = kind("printable text", lambda value: isinstance(value, str) and value.isprintable())
FLAG: Kind = kind("true or false", lambda value: isinstance(value, bool))
OBJECT: Kind = kind("an object", lambda value: isinstance(value, dict))


def maybe(of: Kind) -> Kind:
    """A value or null."""
    return lambda value, place: None if value is None else of(value, place)


class _Optional:
    def __init__(self, of: Kind) -> None:
        self.of = of

    def __call__(self, value: Any, place: str) -> str | None:
        return self.of(value, place)


def optional(of: Kind) -> Kind:
    """A field that a record need not have."""
    return _Optional(of)


def one_of(*words: str) -> Kind:
    """One of some words."""
    return kind(" or ".join(words), lambda value: isinstance(value, str) and value in words)


def each(of: Kind, least: int = 0, count: int | None = None) -> Kind:
    """A list."""

    def look(value: Any, place: str) -> str | None:
        if not isinstance(value, list) or len(value) < least or count not in (None, len(value)):
            wanted = f"a list of {count}" if count is not None else f"a list of {least} or more" if least else "a list"
            return f"{place or 'it'} is {_shown(value)}; wanted {wanted}"
        return _first(of, enumerate(value), place)

    return look


def named(of: Kind) -> Kind:
    """An object whose values are all of one kind."""
    return lambda value, place: OBJECT(value, place) or _first(of, value.items(), place)


def fields(**wanted: Kind) -> Kind:
    """An object that has some keys at least."""

    def look(value: Any, place: str) -> str | None:
        if fault := OBJECT(value, place):
            return fault
        for key, of in wanted.items():
            where = _join(place, key)
            if key not in value:
                if isinstance(of, _Optional):
                    continue
                return f"{where} is not in it"
            if fault := of(value[key], where):
                return fault
        return None

    return look


def version(number: int, of: Kind) -> Kind:
    """An object of a schema's number, which is looked at before all else in it."""

    def look(value: Any, place: str) -> str | None:
        if isinstance(value, dict) and value.get("schema", number) != number:
            return f"it is of schema {_shown(value['schema'])}, this normkit reads schema {number}"
        return fields(schema=COUNT)(value, place) or of(value, place)

    return look


def parse(text: str | bytes) -> Any:
    """Reads JSON that says each key once and holds no NaN."""
    return json.loads(text, parse_constant=_constant, object_pairs_hook=_object)


def _constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not know")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("it says a key twice")
    return made


def _first(of: Kind, entries: Any, place: str) -> str | None:
    return next((fault for key, value in entries if (fault := of(value, _join(place, key)))), None)


def _join(place: str, key: Any) -> str:
    name = str(key)
    name = name if name.isprintable() else repr(name)
    return f"{place}.{name}" if place else name


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping | list):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    text = repr(value) if isinstance(value, str | float) or abs(value) < LARGEST else "beyond all bounds"
    return text if len(text) <= 60 else f"{text[:57]}..."


SECRET = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class UnlikeError(RecordError):
    """The record is of another configuration."""


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        # The file must be new: under this name may lie a link to somewhere else.
        with open(os.open(part, SECRET, 0o666), "wb") as file:
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


def write_text(path: Path, text: str) -> None:
    r"""Writes text as UTF-8, atomically; what of a path is none, such as of a folder named in Latin-1, as ``\udce9``."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows))


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors and plain values as torch saves them, atomically, into a folder that is there."""
    import torch

    if not path.parent.is_dir():
        # What is left of the records would be taken for a stranger's.
        raise RecordError(f"{path.parent} was removed while it was written to; give the same command to begin it again")
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def write_numbers(path: Path, values: np.ndarray) -> None:
    """Writes an array, compressed: whole numbers up to 255 as a byte each, others in single precision; atomically."""
    small = ((values >= 0) & (values <= 255) & (values == values.round())).all()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, values=values.astype(np.uint8 if small else np.float32))
    write_bytes(path, buffer.getvalue())


def read_numbers(path: Path) -> np.ndarray:
    """Reads what :func:`write_numbers` wrote, in double precision."""
    with _reading(path):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)["values"].astype(float)


def read_json(path: Path, of: Kind = OBJECT) -> dict[str, Any]:
    """Reads a JSON object."""
    with _reading(path):
        value = parse(path.read_bytes())
        _check(value, of, "")
        # What an experiment found has no schema of its own; a record from before this was kept has none to check.
        if "sha256" in value and value["sha256"] != digest(value.get("result")):
            raise ValueError("its result is not the one that was written")
    return value


def read_lines(path: Path, of: Kind = OBJECT, numbered: str = "") -> list[dict[str, Any]]:
    """Reads one JSON object a line; the key `numbered`, if any, counts the lines from 1."""
    with _reading(path):
        rows = [parse(line) for line in path.read_text("utf-8").splitlines()]
        for number, row in enumerate(rows, 1):
            _check(row, of, f"line {number}")
            if numbered and row[numbered] != number:
                raise ValueError(f"line {number} is of {numbered} {row[numbered]}")
    return rows


def read_checkpoint(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Reads what :func:`write_checkpoint` wrote; runs no code that the file may hold."""
    import torch

    with _reading(path):
        content = io.BytesIO(path.read_bytes())
        # torch does not look at the checksums that it wrote.
        if bad := zipfile.ZipFile(content).testzip():
            raise ValueError(f"{bad} fails its checksum")
        content.seek(0)
        value = torch.load(content, map_location="cpu", weights_only=True)
        _check(value, fields(**dict.fromkeys(keys, ANY)), "")
    return value


def check_config(path: Path, config: Mapping[str, Any], cure: str) -> None:
    """Writes a configuration, or checks that the one already there is the same."""
    wanted = json.loads(json.dumps(config))
    if not path.exists():
        write_json(path, wanted)
        return
    found = read_json(path)
    if found.get("experiment") != wanted.get("experiment"):
        raise UnlikeError(f"{path.parent} holds records of {_subject(found)}, not of {_subject(wanted)}; {cure}")
    if unlike := _unlike(found, wanted):
        key, there, now = unlike
        raise UnlikeError(
            f"{path.parent} holds records of another configuration: {key} is {json.dumps(there)} there, {json.dumps(now)} now; "
            f"{cure}"
        )


def _unlike(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key that differs, within objects that both have, and what it is in each."""
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        there, now = found.get(key), wanted.get(key)
        if there != now:
            within = _unlike(there, now) if isinstance(there, dict) and isinstance(now, dict) else None
            return within or (key, there, now)
    return None


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


def writable(folder: Path) -> bool:
    """Whether files can be written into a folder."""
    try:
        write_bytes(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except (OSError, RecordError):
        return False
    return True


def digest(value: Any) -> str:
    """Hashes what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _check(value: Any, of: Kind, place: str) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"it holds a {type(value).__name__}, not an object")
    if fault := of(value, place):
        raise ValueError(fault)


def _subject(config: Mapping[str, Any]) -> str:
    if "experiment" not in config:
        return "a comparison by an earlier normkit"
    return "a comparison" if config["experiment"] == "compare" else f"the experiment {config['experiment']}"


def _cure(path: Path) -> str:
    # A run lies in runs/<recipe>/rate=<rate>/seed=<seed>; what is above it stands for the whole comparison.
    if path.parent.name.startswith("seed="):
        return f"remove the folder {path.parent} and give the same command: only this run is trained again"
    return f"restore it, or remove {path} and give the same command: finished runs are kept"
