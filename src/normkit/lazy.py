"""Packages that load their names when the first is requested, so that importing them does not import torch."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(package: str, source: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__`` (PEP 562), which import its names from ``source`` at the first of them."""

    def load() -> dict[str, Any]:
        names, module = vars(sys.modules[package]), import_module(source)
        names.update({name: getattr(module, name) for name in module.__all__}, __all__=module.__all__)
        return names

    def get(name: str) -> Any:
        # Python and its tools look for many names with underscores, none of which is worth an import of torch.
        if name == "__all__" or not name.startswith("_"):
            names = load()
            if name in names:
                return names[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])

    def listed() -> list[str]:
        names = load()
        return sorted({*names["__all__"], *(name for name in names if name.startswith("__"))})

    return get, listed
