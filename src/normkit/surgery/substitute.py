"""Puts modules in the place of others, with the hooks, modes and attributes of those."""

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from normkit.core.errors import SurgeryError
from normkit.surgery.changes import Change, Refusals, label
from normkit.surgery.norms import describe
from normkit.surgery.select import Where, choose
from normkit.surgery.watch import Sight, try_on

Pairs = dict[str, tuple[nn.Module, nn.Module]]

# Shared with the old layer, not copied: handles that remove a hook point at these very dictionaries.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def put(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """``replace_modules``, with what follows from it for torch's fused encoder. Call this in a transaction."""
    root = replace_modules(model, new)
    if new:
        leave_fast_path(root)
    return root


def build_all(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    where: Where | None,
    example: Any,
    make: Callable[[str, nn.Module, Sight | None], tuple[nn.Module, str] | None],
    refusals: Refusals,
) -> tuple[Pairs, dict[str, Change]]:
    """Make what is to stand in the place of a model's norms: old and new, and a row of each, by name; ``make`` may leave one."""
    chosen = found if where is None else choose(found, where, "norms")
    lazy = any(is_lazy(tensor) for tensor in model.parameters())  # a run would give them their size
    sight = None if example is None or lazy else try_on(model, example, chosen.values(), "model")
    pairs, rows = Pairs(), dict[str, Change]()
    for name, module in chosen.items():
        try:
            made = make(name, module, sight)
            if made is None:
                continue
            if sight is not None:
                refuse(name, sight.why_without_effect(module))
        except SurgeryError as error:
            refusals.take(name, error)
            continue
        pairs[name] = module, inherit(made[0], module)
        rows[name] = Change(label(name), describe(module), describe(made[0]), made[1])
    return pairs, rows


def put_heard(model: nn.Module, pairs: Pairs, rows: dict[str, Change], example: Any, refusals: Refusals) -> nn.Module:
    """Put new modules in the place of old ones and run the model on an example, if there is one; in a transaction."""
    root = put(model, {id(old): new for old, new in pairs.values()})
    if example is None:
        return root
    sight = try_on(root, example, (new for _, new in pairs.values()))
    for name, (old, new) in pairs.items():
        try:
            refuse(name, sight.why_without_effect(new))
        except SurgeryError as error:
            refusals.take(name, error)
            root = put(root, {id(new): old})
            del rows[name]
    return root


def refuse(name: str, reason: str) -> None:
    """Raise a reason, if there is one, about a layer."""
    if reason:
        raise SurgeryError(f"{label(name)}: {reason}; leave it out with where=, or with on_refusal='leave'")


def inherit(made: nn.Module, module: nn.Module) -> nn.Module:
    """Give a module that is to stand in another's place its training flag, hooks and what its user set on it."""
    made.train(module.training)
    for hooks in _HOOKS:
        if hasattr(module, hooks):
            setattr(made, hooks, getattr(module, hooks))
    own = _own_names(type(module))
    for name, value in vars(module).items():
        # Private ones are what a class or a wrapper keeps of this very module; a method bound to it would call it.
        if name.startswith("_") or name in own or hasattr(made, name) or getattr(value, "__self__", None) is module:
            continue
        setattr(made, name, value)
    return made


def lost(made: nn.Module, module: nn.Module) -> list[str]:
    """The public attributes of a module's class, by its code, that one in its place lacks."""
    own = _own_names(type(module))
    return [name for name in vars(module) if name in own and not name.startswith("_") and not hasattr(made, name)]


def _own_names(cls: type) -> set[str]:
    """Every name that a class's code speaks of: an attribute that is not among them is its user's."""
    functions = (value for base in cls.__mro__ for value in vars(base).values() if isinstance(value, FunctionType))
    return {name for function in functions for name in function.__code__.co_names}


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put new modules wherever the old ones stand; return the root."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(model), model)


def leave_fast_path(model: nn.Module) -> None:
    """Make encoder layers whose norms are no longer layer norms with weight and bias run their modules.

    In evaluation without gradients ``nn.TransformerEncoderLayer`` hands the weight, bias and eps of norm1 and norm2 to a fused
    kernel that computes layer normalization whatever modules stand there. It does so only for an activation that the kernel
    knows, by an attribute that nothing else reads; ``nn.TransformerEncoder`` makes nested tensors for it only if told.
    """
    left = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not (
            _is_layer_norm(module.norm1) and _is_layer_norm(module.norm2)
        ):
            module.activation_relu_or_gelu = 0
            left.add(id(module))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(id(layer) in left for layer in module.layers):
            module.use_nested_tensor = False


def _is_layer_norm(module: nn.Module) -> bool:
    whole = isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None
    return whole and getattr(module, "over", None) is None
