"""normkit: normalization for PyTorch networks.

Every normalization computes statistics over a support set, normalizes by them, and compensates. ``Support`` describes
the set once; layers, functions, pictures, tests and kernels are derived from it.
"""

from typing import TYPE_CHECKING

from normkit.lazy import lazily

__version__ = "0.2.0"

# A type checker reads the names at their source, so that it still reports unknown ones.
if TYPE_CHECKING:
    from normkit.api import *  # noqa: F403
else:
    __getattr__, __dir__ = lazily(__name__, "normkit.api")
