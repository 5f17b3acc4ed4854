"""Dispatch modes that only observe, under which kernels run as they do without them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class Onlooker(TorchDispatchMode):
    """A mode that observes tensors, and neither needs to see every operator nor changes one.

    Most modes must see PyTorch's operators, which kernels hide; so kernels do not run under a mode. Under this one they do: what
    is observed is what runs.
    """


def modes_at_work() -> bool:
    """Whether a dispatch mode is active that is not an :class:`Onlooker`."""
    return torch._C._len_torch_dispatch_stack() > 0 and not all(
        isinstance(mode, Onlooker) for mode in _get_current_dispatch_mode_stack()
    )
