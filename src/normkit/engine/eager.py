"""Whether eager PyTorch alone is active, or also something that must see PyTorch's operators."""

from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from normkit.engine.onlooker import modes_at_work


def recorded() -> bool:
    """Whether a compiler or ``torch.jit.trace`` records the calls, for inputs that come later."""
    return is_compiling() or _get_tracing_state() is not None


def traced() -> bool:
    """Whether a compiler, ``torch.func`` or forward mode is active, which cannot see through a custom autograd.Function."""
    return is_compiling() or differentiated()


def differentiated() -> bool:
    """Whether ``torch.func`` or forward mode is active."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether anything active must see each operator, which kernels hide: any of the above, a mode, or ``torch.jit.trace``."""
    return (
        is_compiling()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        # The length first: it is one call into C, while the modes are walked in Python.
        or (_len_torch_dispatch_stack() > 0 and modes_at_work())
    )
