"""The memory of a weight computed in one step, kept for the next step.

The first write to a fresh tensor of a megabyte or more costs several times what a later one does, as the system allocates pages
of zeros. A weight that is recomputed at each step has the same size each time; so its memory is overwritten as soon as no tensor,
view or array holds it any more. (A storage that is kept without a tensor does not count.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _holders(tensor: Tensor) -> int:
    """Number of tensors, views and arrays that share the memory of this one, plus a constant."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _unshared() -> int:
    """What ``_holders`` returns for memory that one tensor holds; 0, which it never returns, where it can't tell one from two."""
    try:
        tensor = torch.empty(1)
        alone = _holders(tensor)
        both = (tensor.data, tensor)
        return alone if _holders(both[1]) == alone + 1 else 0
    except AttributeError:
        return 0


_UNSHARED = _unshared()


class Spare:
    """At most one block of memory; a copy or a pickle of it is empty."""

    __slots__ = ("_free",)

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, like: Tensor) -> Tensor:
        """An uninitialized tensor of this shape, strides and dtype; it belongs to the caller."""
        try:
            kept = self._free.pop()  # one atomic step, so that no two threads get the same block
        except IndexError:
            kept = None
        if (
            kept is None
            or _holders(kept) != _UNSHARED
            or kept.shape != like.shape
            or kept.stride() != like.stride()
            or kept.dtype != like.dtype
        ):
            if torch.is_inference_mode_enabled():  # a tensor made here could not be used in training
                return torch.empty_like(like)
            kept = torch.empty_like(like)
        taken = kept.data  # with its own version counter
        self._free[:] = [kept]
        return taken

    def empty(self) -> None:
        """Free the memory."""
        self._free.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Spare:
        return Spare()

    def __reduce__(self) -> tuple[type[Spare], tuple[()]]:
        return Spare, ()
