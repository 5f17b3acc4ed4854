"""All or nothing: a verb that fails leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put back every module's class, attributes, parameters, buffers, children and hooks if the block raises.

    Tensors are put back by reference: the block must make new ones in place of writing into those that it found. Dictionaries
    stay the same objects, as handles of hooks point at them.
    """
    saved = [(module, type(module), dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, contents in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                attributes[name].clear()
                attributes[name].update(content)
        raise


def _contents(module: nn.Module) -> dict[str, dict[Any, Any] | set[Any]]:
    return {name: value.copy() for name, value in vars(module).items() if isinstance(value, dict | set)}
