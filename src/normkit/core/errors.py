"""Every error that normkit raises on purpose.

    NormkitError
     ├─ NotationError   (ValueError)                a support set, recipe or selector that cannot be read
     ├─ ShapeError      (ValueError, RuntimeError)  a tensor whose shape does not fit
     ├─ OptionError     (ValueError)                an argument outside its range
     ├─ BackendError    (RuntimeError)              the requested back end cannot run this
     ├─ SurgeryError    (RuntimeError)              a model that cannot be changed as asked
     ├─ ProtocolError   (TypeError, ValueError)     a model or data factory that breaks its protocol
     └─ RecordError     (RuntimeError)              a folder of records that is corrupt, foreign or not writable

Each also derives from the built-in error that torch raises in the same place, so code that catches torch's keeps working.
A message says what failed, what it got, what it wanted and how to fix it; for a misspelt name, what was probably meant.
"""

import difflib
from collections.abc import Iterable
from typing import Any, get_args


class NormkitError(Exception):
    """Base of every error that normkit raises on purpose."""


class NotationError(NormkitError, ValueError):
    """A support set, recipe or selector that cannot be read."""


class ShapeError(NormkitError, ValueError, RuntimeError):
    """A tensor whose shape does not fit."""


class OptionError(NormkitError, ValueError):
    """An argument outside its range."""


class BackendError(NormkitError, RuntimeError):
    """The requested back end cannot run this; no other is tried instead."""


class SurgeryError(NormkitError, RuntimeError):
    """A model that cannot be changed as asked; it was left as it was."""


class ProtocolError(NormkitError, TypeError, ValueError):
    """A model or data factory that breaks its protocol."""


class RecordError(NormkitError, RuntimeError):
    """A folder of records that is corrupt, foreign or not writable."""


def closest(word: str, known: Iterable[str]) -> str:
    """A hint at the name that was probably meant, such as "; did you mean 'optimizer'?", or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_options(who: str, **options: tuple[Any, Any]) -> None:
    """Refuse, by OptionError, values that are not among those of a Literal or a tuple: ``mode=(mode, Mode)``."""
    for name, (given, allowed) in options.items():
        known = get_args(allowed) or allowed
        if given not in known:
            *most, last = map(repr, known)
            hint = closest(str(given), [str(value) for value in known])
            raise OptionError(f"{who}: {name}={given!r}; wanted {', '.join(most)} or {last}{hint}")
