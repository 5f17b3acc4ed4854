"""Where data sets lie."""

import os
from pathlib import Path

from normkit.core.errors import ProtocolError

VARIABLE = "NORMKIT_DATA"


def set_root(root: Path | None) -> None:
    """Sets the environment variable ``NORMKIT_DATA``, for factories of data called without a root, on other processes too."""
    if root is not None:
        # A worker may have another working folder.
        os.environ[VARIABLE] = str(root.absolute())


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
