"""Pickles of published data sets, read without running whatever else a pickle may hold."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from normkit.core.errors import ProtocolError

# What plain Python values and numpy arrays need, under the names of numpy 1 and 2.
_ARRAYS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
_BUILDERS = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}


def read_pickle(path: Path, cure: str) -> dict[str, Any]:
    """Reads a pickled dict of plain values, byte strings and numpy arrays; its keys become strings.

    Args:
        path: what to read.
        cure: ends the message.

    Raises:
        ProtocolError: the file is missing, can't be read, is damaged, holds anything else, or is no dict.
    """
    try:
        with open(path, "rb") as file:
            value = _Reader(file, encoding="bytes").load()
    except FileNotFoundError:
        raise ProtocolError(f"{path} is missing; {cure}") from None
    except OSError as error:
        raise ProtocolError(f"cannot read {path}: {error.strerror or error}; make it readable") from error
    except _Forbidden as error:
        raise ProtocolError(f"{path} asks for {error}, which no data set needs; it is not loaded; {cure}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ProtocolError(
            f"{path} is truncated or damaged ({type(error).__name__}: {str(error)[:80]}); {cure}"
        ) from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{path} holds a {type(value).__name__}; wanted a dict; {cure}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): item for key, item in value.items()}


class _Forbidden(Exception):
    pass


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        key = (module_name, global_name)
        if key in _ARRAYS:
            return _ARRAYS[key]
        if key in _BUILDERS:
            return _empty_array
        if key == ("_codecs", "encode"):
            return _latin1
        raise _Forbidden(f"{module_name}.{global_name}")


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    # A pickled array begins empty; its shape and content are set afterwards.
    if kind is not np.ndarray or shape != (0,):
        raise ValueError("an array that is not built as numpy builds it")
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes byte strings for Python 2.
    if encoding != "latin1":
        raise ValueError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")
