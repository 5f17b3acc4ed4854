"""The one list of methods, and what is drawn and printed from it."""

from typing import TYPE_CHECKING, Any

# Only when asked for: the list holds every method's code, and the modules next to it are read without torch.
if TYPE_CHECKING:
    from normkit.catalogue.methods import METHODS, method
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            from normkit.catalogue import methods

            return getattr(methods, name)
        raise AttributeError(f"module 'normkit.catalogue' has no attribute {name!r}")


__all__ = ["METHODS", "method"]
