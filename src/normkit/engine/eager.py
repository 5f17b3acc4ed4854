"""Whether eager PyTorch alone is at work, or something that must see PyTorch's operators."""

import torch

from normkit.engine.onlooker import modes_at_work


def recorded() -> bool:
    """Whether a compiler or ``torch.jit.trace`` records what is called, for inputs that are not there yet.

    >>> recorded()
    False
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def traced() -> bool:
    """Whether a compiler, ``torch.func`` or forward mode is at work, to which a function with a backward of its own is opaque.

    >>> traced()
    False
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def watched() -> bool:
    """Whether anything is at work that must see each operator: the above, a mode, or ``torch.jit.trace``. A kernel hides them.

    >>> watched()
    False
    """
    return traced() or recorded() or modes_at_work()
