"""Where data sets lie, and what is said of their files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normkit.core.errors import ProtocolError

VARIABLE = "NORMKIT_DATA"


def set_root(root: Path | None) -> None:
    """Sets the environment variable ``NORMKIT_DATA``, for factories of data called without a root, on other processes too."""
    if root is not None:
        # A worker may have another working folder.
        os.environ[VARIABLE] = str(root.absolute())


@contextmanager
def reading(path: Path, cure: str) -> Iterator[None]:
    """Says that a file of a data set is missing, can't be read or is damaged, and what to do."""
    # What says nothing of the file comes through as it is: a package that is missing, and memory that is not enough.
    try:
        yield
    except (ProtocolError, ImportError, MemoryError):
        raise
    except FileNotFoundError:
        raise ProtocolError(f"{path} is missing; {cure}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise ProtocolError(f"cannot read {path}: {error.strerror}; make it readable") from error
        # Readers raise what they please at a damaged file: ValueError, IndexError, SyntaxError, AttributeError.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ProtocolError(f"{path} is truncated or damaged ({reason}); {cure}") from error


def data_root(root: Path | str | None = None, *, make: bool = False) -> Path:
    """Finds the folder under which data sets lie in their published layouts."""
    given = root or os.environ.get(VARIABLE)
    if not given:
        raise ProtocolError(
            f"no folder of data sets is given; use --data-root DIR or set the environment variable {VARIABLE}"
        )
    if make:
        try:
            Path(given).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise ProtocolError(f"cannot make {given}: {reason}; give another by --data-root or {VARIABLE}") from error
    if not Path(given).is_dir():
        raise ProtocolError(f"{given} is no folder; give the one that holds the data sets by --data-root or {VARIABLE}")
    return Path(given)
