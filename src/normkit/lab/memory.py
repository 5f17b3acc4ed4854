"""Memory of training steps: its peak, and keeping it from one step to the next."""

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from normkit.engine.onlooker import Onlooker

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Measures the most memory that a step holds at once, beyond what was held when it began.

    On CUDA it is the allocator's ``max_memory_allocated`` less what was allocated. Elsewhere it is the peak of the live storages
    of all tensors that the step's operators returned; it leaves out what an operator allocates and frees inside itself (such as
    the unfolded image of a convolution). What the step recreates, such as gradients, should be dropped before, or it counts as
    held.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as live:
        step()
    return live.peak


@cache
def keep_memory() -> bool:
    """Makes the C library keep memory that tensors on the CPU gave up, for those of the next step.

    Otherwise large blocks go back to the system at the end of each step and are mapped again, page by page, in the next:
    a quarter of a step of a DenseNet on one core. The process stays as large as it ever was. False where the C library is
    not glibc, which alone can do it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    except (AttributeError, OSError, TypeError):
        return False
    # No block of a mapping of its own, and no end of the heap given back.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


class _LiveStorages(Onlooker):
    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            self._see(tensor, new=False)
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            self._see(tensor, new=True)
        return result

    def _see(self, tensor: Any, new: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes() if new else 0
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        # The finalizer runs when the last tensor or saved value that uses the storage is gone.
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
