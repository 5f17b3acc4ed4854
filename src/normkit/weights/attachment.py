"""How a parametrization is put on a layer, so that copies of the layer are whole.

torch keeps ``layer.weight`` as a property of a class that it makes for the layer. A deep copy shares that class: folding
the copy takes the property from the original too, and ``parametrize.cached`` hands one's weight to the other. Layers that
normkit parametrizes copy into a class of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from normkit.core.errors import OptionError

Layer = TypeVar("Layer", bound=nn.Module)


def attach(
    layer: Layer,
    name: str,
    parametrization: nn.Module,
    *,
    splits: bool = False,
    forward: Callable[..., Any] | None = None,
) -> Layer:
    """Register a parametrization on a layer's tensor, in place.

    Args:
        layer: that holds the tensor.
        name: of the tensor.
        parametrization: with ``forward`` and ``right_inverse``.
        splits: whether ``right_inverse`` gives several tensors, so that nothing can stand before it.
        forward: replaces the layer's own until the last parametrization is removed.

    Returns:
        The layer.

    Raises:
        OptionError: ``splits``, and the tensor is parametrized already.
    """
    if splits and parametrize.is_parametrized(layer, name):
        who = type(parametrization).__name__
        raise OptionError(
            f"{who}: the {name} is parametrized already and {who} must come first; fold what is there, or swap the order"
        )
    parametrize.register_parametrization(layer, name, parametrization, unsafe=splits)
    layer.get_submodule("parametrizations").train(layer.training)
    _own(layer, forward)
    _shorten(type(layer), name)
    return layer


def _shorten(cls: type[nn.Module], name: str) -> None:
    """Makes the way to a tensor with one parametrization shorter; torch's own is about as long as the work on a small weight."""
    whole = vars(cls)[name]
    if not isinstance(whole, property) or whole.fget is None or getattr(whole.fget, "shortened", False):
        return
    torch_way = whole.fget

    def get(self: nn.Module) -> Tensor:
        if parametrize._cache_enabled or torch.compiler.is_compiling():
            return torch_way(self)
        found = self._modules["parametrizations"]._modules[name]  # pyright: ignore[reportOptionalMemberAccess]
        assert found is not None
        # With hooks, or more than one parametrization, all of it.
        if len(found._modules) != 1 or found._forward_hooks or found._forward_pre_hooks or _has_any_global_hook():
            return torch_way(self)
        (part,) = found._modules.values()
        return part(*found._parameters.values()) if not found._buffers else torch_way(self)  # pyright: ignore

    get.shortened = True  # pyright: ignore[reportFunctionMemberAccess]
    setattr(cls, name, property(get, whole.fset))


def _own(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    cls = type(layer)
    if "__deepcopy__" in vars(cls):  # otherwise the layer has a way to copy of its own
        cls.__deepcopy__ = _copy  # pyright: ignore[reportAttributeAccessIssue]
    if forward is not None:
        cls.forward = forward


def _copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    plain = parametrize.type_before_parametrizations(self)
    replica = nn.Module.__new__(plain)
    memo[id(self)] = replica
    replica.__dict__ = deepcopy(self.__dict__, memo)
    parametrize._inject_new_class(replica)
    for name in replica.parametrizations:  # pyright: ignore[reportGeneralTypeIssues]
        parametrize._inject_property(replica, name)
        if getattr(getattr(type(self), name).fget, "shortened", False):
            _shorten(type(replica), name)
    _own(replica, vars(type(self)).get("forward"))
    return replica
