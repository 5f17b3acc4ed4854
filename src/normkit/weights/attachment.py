"""Attach a parametrization to a layer such that copies of the layer are complete.

torch makes ``layer.weight`` a property of a class that it creates for the layer. A deep copy shares that class: folding the copy
removes the property from the original too, and ``parametrize.cached`` returns one's weight for the other. Such a layer refuses to
pickle. A layer that normkit parametrizes or folds gets its own class, and so does each copy of it, pickled or not.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from normkit.core.errors import OptionError
from normkit.core.support import show
from normkit.engine.eager import watched

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# Makes the forward that replaces that of a layer's class; a function that a pickle can name.
Forward = Callable[[nn.Module], Callable[..., Any]]

_ORIGINALS = ("original", *(f"original{i}" for i in range(8)))


def attach(
    layer: ModuleT,
    name: str,
    parametrization: nn.Module,
    *,
    splits: bool = False,
    forward: Forward | None = None,
    directed: bool = False,
) -> ModuleT:
    """Register a parametrization on a layer's tensor, in place.

    ``splits``: its ``right_inverse`` returns several tensors, so that no parametrization can come before it. ``forward``
    makes the forward that replaces the layer's own until the last parametrization is removed. ``directed`` warns of a trained
    weight of zero, which has no direction.
    """
    if splits and parametrize.is_parametrized(layer, name):
        who = type(parametrization).__name__
        raise OptionError(f"{who}: the {name} is already parametrized and {who} must come first; fold that, or swap")
    if directed:
        _warn_of_zeros(layer, name, type(parametrization).__name__)
    if parametrize.is_parametrized(layer):
        own_class(layer)  # registering adds a property to the class, which a copy made before may share
    parametrize.register_parametrization(layer, name, parametrization, unsafe=splits)
    layer.get_submodule("parametrizations").train(layer.training)  # new modules are in training, whatever the layer is
    _equip(layer, forward)
    _shorten(type(layer), name)
    return layer


def _warn_of_zeros(layer: nn.Module, name: str, who: str) -> None:
    weight = getattr(layer, name)
    if not weight.requires_grad or weight.is_meta or type(weight) not in (Tensor, nn.Parameter) or watched():
        return
    if weight.numel() and not weight.detach().any():
        warnings.warn(
            f"{who}: the {name} of {type(layer).__name__} ({show(weight.shape)}) is all zero and has no direction, but "
            "only its direction would be trained: it would never learn, or jump once and then stay; leave this layer out, "
            "or initialize it to other values than zero",
            stacklevel=4,
        )


def originals(held: nn.Module) -> list[Tensor]:
    """The raw tensors of a ``ParametrizationList``, in the order of its parametrization's arguments."""
    # By name: under FSDP, in replicas, and where one was registered again, its parameters lack them or are reordered.
    known = held._parameters
    names = _ORIGINALS[:1] if held.is_tensor else _ORIGINALS[1 : 1 + held.ntensors]  # pyright: ignore
    return [found if (found := known.get(name)) is not None else getattr(held, name) for name in names]


def hooked(*modules: nn.Module) -> bool:
    """Whether calling one of the modules runs hooks, so that the call must not be bypassed."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    return bool(_has_any_global_hook())


def _shorten(cls: type[nn.Module], name: str) -> None:
    """Shorten the access to a tensor with one parametrization; torch's own takes about as long as the work on a small weight."""
    whole = vars(cls)[name]
    if not isinstance(whole, property) or whole.fget is None or getattr(whole.fget, "shortened", False):
        return
    torch_way = whole.fget

    def get(self: nn.Module) -> Tensor:
        if parametrize._cache_enabled or torch.compiler.is_compiling():
            return torch_way(self)
        found = self._modules["parametrizations"]._modules[name]  # pyright: ignore[reportOptionalMemberAccess]
        assert found is not None
        # With hooks, or with more than one parametrization, torch's own access does it all.
        if len(found._modules) != 1 or hooked(found):
            return torch_way(self)
        (part,) = found._modules.values()
        return part(*originals(found))  # pyright: ignore[reportOptionalCall]

    # Marked, so that the class of a copy is shortened likewise, and this one not twice.
    get.shortened = True  # pyright: ignore[reportFunctionMemberAccess]
    setattr(cls, name, property(get, whole.fset))


def own_class(layer: nn.Module) -> None:
    """Give a layer that anyone parametrized a class that no copy of it shares."""
    _give_class(layer, *_class_of(layer))


def _class_of(layer: nn.Module) -> tuple[type[nn.Module], dict[str, bool], Forward | None]:
    """The plain class, the parametrized tensors with whether their access is shortened, and what makes the forward."""
    cls = type(layer)
    short = {name: hasattr(getattr(cls, name).fget, "shortened") for name in layer.parametrizations}  # pyright: ignore
    return parametrize.type_before_parametrizations(layer), short, getattr(cls, "_makes_forward", None)


def _give_class(layer: nn.Module, plain: type[nn.Module], names: dict[str, bool], forward: Forward | None) -> nn.Module:
    layer.__class__ = plain
    parametrize._inject_new_class(layer)
    for name, short in names.items():
        parametrize._inject_property(layer, name)
        if short:
            _shorten(type(layer), name)
    _equip(layer, forward)
    return layer


def _equip(layer: nn.Module, forward: Forward | None) -> None:
    cls = type(layer)
    if "__deepcopy__" in vars(cls):  # torch's; a layer that defines its own keeps it
        del cls.__deepcopy__  # pyright: ignore[reportAttributeAccessIssue]
    cls.__reduce_ex__ = _reduce
    if forward is not None:
        cls._makes_forward = staticmethod(forward)  # pyright: ignore[reportAttributeAccessIssue]
        cls.forward = forward(layer)


def _reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
    plain = parametrize.type_before_parametrizations(self)
    state = plain.__getstate__(self) if hasattr(plain, "__getstate__") else vars(self)  # pyright: ignore
    if "_flat_weights" in state:
        # A recurrent layer keeps the weights of its last pass. Computed ones can't be copied with their graph, and the next pass
        # computes them again.
        kept = [weight if weight is None or weight.is_leaf else weight.detach() for weight in state["_flat_weights"]]
        state = {**state, "_flat_weights": kept}
    return _blank, _class_of(self), state


def _blank(plain: type[nn.Module], names: dict[str, bool], forward: Forward | None) -> nn.Module:
    return _give_class(plain.__new__(plain), plain, names, forward)
