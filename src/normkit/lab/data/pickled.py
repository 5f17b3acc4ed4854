"""Pickled plain values, byte strings and arrays, read without running whatever else a pickle may hold."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from normkit.core.errors import ProtocolError
from normkit.lab.data.root import reading

_PLAIN = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and 2


class _Inert:
    """What a pickle builds by a name: what was asked for, which does nothing and is looked at when all is read."""

    __slots__ = ("given", "state")

    def __init__(self, *given: Any) -> None:
        self.given, self.state = given, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Inert): ...


class _Whose(_Inert): ...


class _Kind(_Inert): ...


class _Bytes(_Inert): ...  # how Python 3 writes byte strings for Python 2


_NAMES = {("numpy", "ndarray"): _Whose, ("numpy", "dtype"): _Kind, ("_codecs", "encode"): _Bytes}
_NAMES |= {(module, "_reconstruct"): _Array for module in _MULTIARRAY}


class _Forbidden(Exception): ...


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _NAMES:
            raise _Forbidden(f"{module_name}.{global_name}")
        return _NAMES[module_name, global_name]


def read_pickle(path: Path, cure: str) -> dict[str, Any]:
    """Reads a pickled dict of plain values, byte strings and numpy arrays; its keys become strings."""
    with reading(path, cure), open(path, "rb") as file:
        try:
            value = _made(_Reader(file, encoding="bytes").load())
        except _Forbidden as error:
            raise ProtocolError(f"{path} asks for {error}, which no data set needs; it is not loaded; {cure}") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"{path} holds a {type(value).__name__}; wanted a dict; {cure}")
    return {_text(key): item for key, item in value.items()}


def _made(value: Any) -> Any:
    """Makes arrays and bytes of what was read, and refuses any other use of a name."""
    if isinstance(value, dict):
        return {_made(key): _made(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_made, value))
    if isinstance(value, _Bytes):
        text, encoding = value.given
        if encoding != "latin1":
            raise ValueError(f"bytes in encoding {encoding!r}")
        return text.encode("latin1")
    return _array(value) if isinstance(value, _Inert | type) else value


def _array(value: Any) -> np.ndarray:
    # As numpy pickles one: it begins empty, and its shape and content are set afterwards.
    whose, first, _ = value.given
    _version, shape, kind, fortran, content = value.state
    _version, order, *parts = kind.state
    code, order, content = _text(kind.given[0]), _text(order), _made(content)
    built = type(value) is _Array and whose is _Whose and first == (0,) and type(kind) is _Kind
    # A subtype, names and fields would make another kind of it.
    plain = code in _PLAIN and order in "<>|=" and not any(part is not None for part in parts[:3])
    if not (built and plain and type(shape) is tuple and type(content) is bytes):
        raise ValueError(f"an array of kind {code!r} that is not built as numpy builds a plain one")
    flat = np.frombuffer(content, np.dtype(code).newbyteorder(order))  # pyright: ignore[reportArgumentType]
    if not all(type(length) is int and length >= 0 for length in shape) or flat.size != math.prod(shape):
        raise ValueError(f"{flat.size} numbers for an array of shape {shape}")
    # A copy: what torch is given must be writable, and in this machine's order of bytes.
    return flat.astype(flat.dtype.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
