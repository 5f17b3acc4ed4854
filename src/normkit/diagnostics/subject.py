"""What a measurement is taken of: a model whose layers have sizes, its modules, and the target of a batch."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normkit.core.errors import OptionError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
Where = Callable[[str, nn.Module], bool]


def refuse_lazy(model: nn.Module, who: str) -> None:
    """Refuse a model of which a layer has no size yet."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise OptionError(f"{who}: {name} has no size yet; run the model once on an example first")


def bare(name: str) -> str:
    """A module's name in the plain model, where it or a part of it is compiled, sharded or checkpointed."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def chosen(model: nn.Module, where: Where | None) -> dict[nn.Module, str]:
    """The modules that are looked at, with their names: those for which ``where`` is true, else those that call no other."""
    named = ((bare(name), module) for name, module in model.named_modules() if not hasattr(module, "_orig_mod"))
    return {module: name for name, module in named if (where or _is_leaf)(name, module)}


def _is_leaf(name: str, module: nn.Module) -> bool:
    # Torch's attention has its output projection in it, and does not call it.
    within = set() if isinstance(module, nn.MultiheadAttention) else {key for key, _ in module.named_children()}
    return within <= {"parametrizations"} and "parametrizations" not in name.split(".")


def target_of(batch: Any, who: str) -> Tensor:
    """The target in a batch: ``labels`` of a dict, the second of a pair."""
    try:
        if isinstance(batch, Tensor):  # whose rows are examples
            raise TypeError
        return batch["labels"] if isinstance(batch, Mapping) else batch[1]
    except (KeyError, IndexError, TypeError):
        got = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise OptionError(f"{who}: a loss needs (input, target), or a dict with 'labels'; got {got}") from None


def is_reentrant(loss: Tensor) -> bool:
    """Whether reentrant checkpointing is behind a loss: derivatives by given tensors may lack what is checkpointed, silently."""
    seen, found = set[Any](), [loss.grad_fn]
    while found:
        node = found.pop()
        if node is not None and node not in seen:
            if node.name() == "CheckpointFunctionBackward":
                return True
            seen.add(node)
            found += [following for following, _ in node.next_functions]
    return False


def refuse_reentrant(loss: Tensor, who: str) -> None:
    """Refuse a loss behind reentrant checkpointing."""
    if is_reentrant(loss):
        raise OptionError(f"{who}: reentrant activation checkpointing hides parameters; give it use_reentrant=False")
