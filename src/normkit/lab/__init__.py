"""The lab: fair comparisons of recipes on a user's own model and data; needs the extra ``normkit[lab]``.

``compare`` is the comparison from Python; it gives an ``Outcome``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normkit.lab.outcome import Outcome as Outcome
    from normkit.lab.outcome import compare as compare
else:

    def __getattr__(name: str) -> Any:
        # Not at once: the command line imports parts of the lab that need no torch.
        if name in ("Outcome", "compare"):
            return getattr(import_module("normkit.lab.outcome"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
