"""normkit: normalization for PyTorch networks.

Every normalization computes statistics over a support set, normalizes by them, and compensates. ``Support`` writes the set
down once; layers, functions, pictures, tests and kernels follow from it.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names are loaded together when the first of them is asked for, so that importing the package for its command line
# does not import torch. A type checker reads them where they stand, and so still knows a name that does not exist.
if TYPE_CHECKING:
    from normkit.api import *  # noqa: F403
else:

    def _load() -> None:
        from importlib import import_module

        api = import_module("normkit.api")
        globals().update({name: getattr(api, name) for name in api.__all__}, __all__=api.__all__)

    def __getattr__(name: str) -> Any:
        if name == "__all__" or not name.startswith("_"):
            _load()
            if name in globals():
                return globals()[name]
        import sys

        raise AttributeError(f"module 'normkit' has no attribute {name!r}", name=name, obj=sys.modules[__name__])

    def __dir__() -> list[str]:
        _load()
        return sorted(globals())
