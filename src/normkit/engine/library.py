"""Finds the library of native kernels that suits this processor, loads it, and gives it torch's threads.

The environment decides where asked: ``NORMKIT_ISA`` is the instruction set, or ``none`` to do without the kernels;
``NORMKIT_LIBRARIES`` is the folder to look in, in place of the package's own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from normkit.core.errors import BackendError

# Each instruction set with the level of the processor that it needs, best first.
_LEVELS = {"x86-64-v4": 4, "x86-64-v3": 3, "baseline": 1}

# Raise it, and what nk_abi of native/level.cpp returns, whenever a structure or the arguments of a function change: a library of
# another number would read what Python hands over at the wrong places.
_ABI = 1
_SYMBOLS = (
    *("nk_abi", "nk_level", "nk_set_threads"),
    *("nk_forward", "nk_backward", "nk_given", "nk_remember"),
    *("nk_weight_forward", "nk_weight_backward", "nk_weights"),
    *("nk_response_forward", "nk_response_backward"),
    *("nk_window_forward", "nk_window_sum", "nk_window_backward"),
)

_PACKAGE = Path(__file__).parent.parent
_TORCH = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
_THREADS = {True: "torch's threads", False: "one thread, as this torch does not share its own"}


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL | None
    what: str  # instruction set and threads, or why there is no library


def library() -> ctypes.CDLL | None:
    """The library of kernels for this processor, loaded at the first call; None where there is none.

    Raises:
        BackendError: ``NORMKIT_ISA`` asks for what is not there.

    >>> (library() is None) == (why_not() is not None)
    True
    """
    return _loaded().library


def why_not() -> str | None:
    """The reason why there is no library, with the cure; None where there is one.

    Raises:
        BackendError: as ``library`` would.
    """
    loaded = _loaded()
    return None if loaded.library is not None else loaded.what


def description() -> str:
    """The instruction set and whose threads run it, or why there is no library.

    Raises:
        BackendError: as ``library`` would.

    >>> "thread" in description() or description() == why_not()
    True
    """
    return _loaded().what


@functools.cache
def _loaded() -> _Loaded:
    return _load(os.environ.get("NORMKIT_ISA", ""), os.environ.get("NORMKIT_LIBRARIES", ""))


def _load(isa: str, elsewhere: str) -> _Loaded:
    if isa not in ("", "none", *_LEVELS):
        raise BackendError(f"NORMKIT_ISA is {isa!r}; wanted one of {', '.join(_LEVELS)}, none, or nothing for the best")
    if isa == "none":
        return _Loaded(None, "NORMKIT_ISA is none; unset it to use them")
    folder = Path(elsewhere) if elsewhere else _PACKAGE / "lib"
    absent = _absence(folder) or (None if elsewhere else _age(folder))
    if absent is None:
        try:
            found, isa = _open(folder, isa)
        except OSError as error:
            absent = f"they do not load: {error}; to replace them: {_cure()}"
        else:
            shared = _share_threads(found)
            return _Loaded(found, f"{isa}, {_THREADS[shared]}")
    if isa:
        raise BackendError(f"NORMKIT_ISA is {isa!r}, but there are no native kernels: {absent}")
    return _Loaded(None, absent)


def _absence(folder: Path) -> str | None:
    """Why there are no libraries in the folder, or None if there are."""
    if _file(folder, "baseline").exists():
        return None
    if sys.platform == "win32":
        return "they are not made for Windows"
    return f"none are in {folder}; to build them takes a C++ compiler (GCC or Clang) and: {_cure()}"


def _cure() -> str:
    return "make native" if _sources() else "pip install --force-reinstall --no-deps --no-cache-dir normkit"


def _age(folder: Path) -> str | None:
    """Why libraries in a source tree are too old, or None; what Python hands over may no longer be what they read."""
    built = folder / "built"
    if not built.exists():
        return None
    newer = [path.name for path in _sources() if path.stat().st_mtime > built.stat().st_mtime]
    return f"they are older than native/{newer[0]}; to build them again: make native" if newer else None


def _sources() -> list[Path]:
    """The sources that libraries in a source tree are built from; nothing in an installed package."""
    return [path for path in _PACKAGE.parent.parent.glob("native/*.*") if path.suffix in (".cpp", ".h")]


def _file(folder: Path, isa: str) -> Path:
    return folder / f"libnormkit_{isa}.{'dylib' if sys.platform == 'darwin' else 'so'}"


def _open(folder: Path, isa: str) -> tuple[ctypes.CDLL, str]:
    """The library of the instruction set asked for, or of the best one that the processor has."""
    baseline = _open_file(_file(folder, "baseline"))
    level = baseline.nk_level()
    if isa and _LEVELS[isa] > level:
        raise BackendError(
            f"NORMKIT_ISA is {isa!r}, which this processor lacks; the best it has is {_best(folder, level)}"
        )
    if isa and not _file(folder, isa).exists():
        raise BackendError(f"NORMKIT_ISA is {isa!r}, for which no kernels were built; unset it, or use baseline")
    isa = isa or _best(folder, level)
    return (baseline if isa == "baseline" else _open_file(_file(folder, isa))), isa


def _open_file(path: Path) -> ctypes.CDLL:
    """A library, once it is known to be whole, of normkit and of this version's interface.

    Raises:
        OSError: it is not.
    """
    size, needed = path.stat().st_size, _needed(path)
    if size < needed:
        raise OSError(f"{path} is cut short: {size} of {needed} bytes")
    found = ctypes.CDLL(str(path))
    abi = found.nk_abi() if hasattr(found, "nk_abi") else None
    if abi not in (None, _ABI):
        raise OSError(f"{path} was built for another version of normkit: its interface is {abi}, this one's {_ABI}")
    missing = [symbol for symbol in _SYMBOLS if not hasattr(found, symbol)]
    if missing:
        raise OSError(f"{path} is no library of this normkit: it lacks {', '.join(missing)}")
    return found


def _needed(path: Path) -> int:
    """How many bytes a library's own headers say it has; 0 where they are of a kind that the loader checks itself.

    Linux's loader maps what the headers say into memory, and a read past the end of the file then kills the process.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:5] != b"\x7fELF\2":
            return 0
        order = "<" if head[5] == 1 else ">"
        programs, sections = struct.unpack_from(f"{order}QQ", head, 32)
        program_size, program_count, section_size, section_count = struct.unpack_from(f"{order}4H", head, 54)
        file.seek(programs)
        table = file.read(program_size * program_count)
    if len(table) < program_size * program_count:
        return programs + program_size * program_count
    pieces = (struct.unpack_from(f"{order}8x Q 16x Q", table, k * program_size) for k in range(program_count))
    return max(sections + section_size * section_count, *(offset + length for offset, length in pieces))


def _best(folder: Path, level: int) -> str:
    return next(isa for isa, needed in _LEVELS.items() if needed <= level and _file(folder, isa).exists())


def _share_threads(library: ctypes.CDLL) -> bool:
    """Hands the library torch's own threads, as a second pool would fight it for the cores; whether there were any."""
    for name in (str(Path(torch.__file__).parent / "lib" / _TORCH), _TORCH):
        try:
            host = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # the one that torch runs in, never a second
            functions = [
                ctypes.cast(getattr(host, f), ctypes.c_void_p) for f in ("torch_parallel_for", "torch_get_num_threads")
            ]
        except (OSError, AttributeError):
            continue
        library.nk_set_threads(*functions)
        return True
    return False
