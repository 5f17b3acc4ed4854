"""Find and load the library of native kernels for this processor, and let it use torch's threads.

Two environment variables override the choice: ``NORMKIT_ISA`` names the instruction set, or ``none`` to run without the kernels;
``NORMKIT_LIBRARIES`` names the folder to look in instead of the package's own.
"""

import ctypes
import functools
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from normkit.core.errors import BackendError

# The instruction sets, best first, and the processor level that each needs.
_LEVELS = {"x86-64-v4": 4, "x86-64-v3": 3, "baseline": 1}

# Increase it, and what nk_abi in native/level.cpp returns, whenever a structure or the arguments of a function change: a library
# of another version would misread what Python passes.
_ABI = 4
_SYMBOLS = (
    *("nk_abi", "nk_level", "nk_set_threads"),
    *("nk_forward", "nk_measure", "nk_backward", "nk_given", "nk_remember", "nk_dropout", "nk_quantize"),
    *("nk_gate", "nk_gate_backward"),
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
    """The library of kernels for this processor, or None; BackendError where ``NORMKIT_ISA`` asks for what is not there."""
    return _loaded().library


def why_not() -> str | None:
    """Reason there is no library, with the cure, or None if there is one."""
    loaded = _loaded()
    return None if loaded.library is not None else loaded.what


def description() -> str:
    """The instruction set and whose threads run it, or why there is no library."""
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
    """Reason the folder has no libraries, or None if it has."""
    if _file(folder, "baseline").exists():
        return None
    if sys.platform == "win32":
        return "they are not made for Windows"
    return f"none are in {folder}; building them takes a C++ compiler (GCC or Clang) and: {_cure()}"


def _cure() -> str:
    return "make native" if _sources() else "pip install --force-reinstall --no-deps --no-cache-dir normkit"


def _age(folder: Path) -> str | None:
    """Reason the libraries of a source tree are outdated, or None; outdated ones may misread what Python passes."""
    built = folder / "built"
    if not built.exists():
        return None
    newer = [path.name for path in _sources() if path.stat().st_mtime > built.stat().st_mtime]
    return f"they are older than native/{newer[0]}; to build them again: make native" if newer else None


def _sources() -> list[Path]:
    """The sources that the libraries of a source tree are built from; none in an installed package."""
    return [path for path in _PACKAGE.parent.parent.glob("native/*.*") if path.suffix in (".cpp", ".h")]


def _file(folder: Path, isa: str) -> Path:
    return folder / f"libnormkit_{isa}.{'dylib' if sys.platform == 'darwin' else 'so'}"


def _open(folder: Path, isa: str) -> tuple[ctypes.CDLL, str]:
    """Open the library of the requested instruction set, or of the best one that the processor has."""
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
    """Open a library after checking that it is complete, normkit's, and has this version's interface; else OSError."""
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
    """The size of a library by its own headers, past whose end a read kills the process; 0 for formats that loaders check."""
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
    """Let the library use torch's threads, as a second pool would compete for the cores; return whether they were found."""
    for name in (str(Path(torch.__file__).parent / "lib" / _TORCH), _TORCH):
        try:
            host = ctypes.CDLL(
                name, mode=os.RTLD_NOLOAD | os.RTLD_NOW
            )  # the copy that torch runs in, never a second one
            functions = [
                ctypes.cast(getattr(host, f), ctypes.c_void_p) for f in ("torch_parallel_for", "torch_get_num_threads")
            ]
        except (OSError, AttributeError):
            continue
        library.nk_set_threads(*functions)
        return True
    return False
