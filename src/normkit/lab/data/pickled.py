"""Pickles of published data sets, read without running whatever else a pickle may hold."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from normkit.core.errors import ProtocolError
from normkit.lab.data.root import reading

# numpy 1 and 2 name it differently.
_RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_PLAIN = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


def read_pickle(path: Path, cure: str) -> dict[str, Any]:
    """Reads a pickled dict of plain values, byte strings and numpy arrays; its keys become strings."""
    with reading(path, cure), open(path, "rb") as file:
        try:
            value = _arrays(_Reader(file, encoding="bytes").load())
        except _Forbidden as error:
            raise ProtocolError(f"{path} asks for {error}, which no data set needs; it is not loaded; {cure}") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"{path} holds a {type(value).__name__}; wanted a dict; {cure}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): item for key, item in value.items()}


class _Forbidden(Exception):
    pass


class _Call:
    """What a pickle may call in the place of a name, and do nothing else with."""

    __slots__ = ("does",)

    def __init__(self, does: Callable[..., Any]) -> None:
        self.does = does

    def __call__(self, *given: Any) -> Any:
        return self.does(*given)

    def __setstate__(self, state: Any) -> None:
        # A pickle may give a state to whatever it holds.
        raise ValueError("a state where there is none")


class _Kind:
    """The type of the numbers of an array."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        text = _text(code)
        if text not in _PLAIN:
            raise ValueError(f"an array of kind {text!r}")
        self.code, self.order = text, "="

    def __setstate__(self, state: Any) -> None:
        _version, order, *parts = state
        # A subtype, names and fields would make another kind of it.
        if any(part is not None for part in parts[:3]) or _text(order) not in "<>|=":
            raise ValueError("an array of a kind that is not plain")
        self.order = _text(order)


class _Array:
    """An array as numpy pickles one: it begins empty, and its shape and content are set afterwards."""

    __slots__ = ("made",)

    def __init__(self, whose: Any, shape: Any, _code: Any) -> None:
        if whose is not _NDARRAY or shape != (0,):
            raise ValueError("an array that is not built as numpy builds it")
        self.made: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, kind, fortran, content = state
        if type(kind) is not _Kind or type(shape) is not tuple or type(content) is not bytes:
            raise ValueError("an array that is not built as numpy builds it")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"an array of shape {shape}")
        flat = np.frombuffer(content, np.dtype(kind.code).newbyteorder(kind.order))  # pyright: ignore[reportArgumentType]
        if flat.size != math.prod(shape):
            raise ValueError(f"{flat.size} numbers for an array of shape {shape}")
        # A copy: what torch is given must be writable, and in this machine's order of bytes.
        self.made = flat.astype(flat.dtype.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")


def _never(*_: Any) -> None:
    raise _Forbidden("a call of numpy.ndarray")


_NDARRAY = _Call(_never)  # it is named, as what is to be built; a pickle that calls it means to read memory


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        key = (module_name, global_name)
        if key == ("numpy", "ndarray"):
            return _NDARRAY
        if key == ("numpy", "dtype"):
            return _Call(_Kind)
        if key in _RECONSTRUCT:
            return _Call(_Array)
        if key == ("_codecs", "encode"):
            return _Call(_latin1)
        raise _Forbidden(f"{module_name}.{global_name}")


def _arrays(value: Any) -> Any:
    """Replaces arrays as they were read by numpy's, and refuses anything else."""
    if isinstance(value, _Array):
        if value.made is None:
            raise ValueError("an array without content")
        return value.made
    if isinstance(value, dict):
        return {_arrays(key): _arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_arrays, value))
    if isinstance(value, _Call | _Kind):
        raise ValueError("a name of numpy in the place of a value")
    return value


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes byte strings for Python 2.
    if encoding != "latin1":
        raise ValueError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")
