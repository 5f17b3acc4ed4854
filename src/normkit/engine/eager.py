"""Whether eager PyTorch alone is at work, or something that must see PyTorch's operators."""

from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from normkit.engine.onlooker import modes_at_work


def recorded() -> bool:
    """Whether a compiler or ``torch.jit.trace`` records what is called, for inputs that are not there yet.

    >>> recorded()
    False
    """
    return is_compiling() or _get_tracing_state() is not None


def traced() -> bool:
    """Whether a compiler, ``torch.func`` or forward mode is at work, which cannot see through a custom autograd.Function.

    >>> traced()
    False
    """
    return is_compiling() or differentiated()


def differentiated() -> bool:
    """Whether ``torch.func`` or forward mode is at work.

    >>> torch.func.vmap(lambda x: x * differentiated())(torch.ones(2))
    tensor([1., 1.])
    """
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether anything is at work that must see each operator: the above, a mode, or ``torch.jit.trace``. A kernel hides them.

    >>> watched()
    False
    """
    return (
        is_compiling()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or (_len_torch_dispatch_stack() > 0 and modes_at_work())
    )
