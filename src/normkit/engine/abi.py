"""The contract between Python and the C++ library: types, functions, statuses, and which tensors may be passed.

This mirrors native/*.h. Every tensor passes :func:`plain` (or a cached decision whose key implies it) before its pointer is
taken, and every call returns a status that :func:`checked` reads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from normkit.core.errors import BackendError
from normkit.core.support import show
from normkit.engine.eager import watched
from normkit.engine.library import library

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# A letter per argument: p a pointer, i an integer of 64 bits, d a double. Each function returns a status.
_SIGNATURES = {
    "nk_forward": "p" * 10,
    "nk_measure": "p" * 5,
    "nk_backward": "p" * 11,
    "nk_quantize": "p" * 6,
    "nk_dropout": "iiidpp",
    "nk_gate": "iiippp",
    "nk_gate_backward": "iiippppp",
    "nk_remember": "iiiddipppp",
    "nk_given": "pipppp",
    "nk_weight_forward": "pppp",
    "nk_weight_backward": "pppppp",
    "nk_weights": "ippi",
    "nk_response_forward": "p" * 6,
    "nk_response_backward": "p" * 8,
    "nk_window_forward": "ppp",
    "nk_window_backward": "pppp",
    "nk_window_sum": "ppp",
}
_LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_STATUSES: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "no memory is left for the workspace of a normalization kernel"),
    3: (
        BackendError,
        "a tensor has no memory behind it, such as a parameter that FSDP has freed; "
        "call the module through its wrapper, or gather its parameters first",
    ),
    4: (BackendError, "torch's threads stopped half-way through a normalization kernel; its output is invalid"),
}


@functools.cache
def entry(name: str) -> Any:
    """A function of the library, or None where there is no library."""
    function = getattr(library(), name, None)
    if function is not None:
        function.argtypes = [_LETTERS[letter] for letter in _SIGNATURES[name]]
        function.restype = ctypes.c_int32
    return function


def checked(status: int) -> None:
    """Raise unless a kernel answered that all is well."""
    if status:
        kind, text = _STATUSES.get(status, (BackendError, f"a kernel returned status {status}; please report this"))
        raise kind(text)


def plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may read these tensors: plain ones on a CPU, while nothing but eager PyTorch is active.

    >>> plain(torch.ones(2)), plain(torch.ones(2, device="meta"))
    (True, False)
    """
    return not watched() and all(t is None or readable(t) for t in tensors)


def readable(t: Tensor) -> bool:
    """Whether the library can read a tensor through its pointer."""
    return (
        is_plain(t)
        and t.is_cpu
        and t.dtype in TYPES
        and t.layout == torch.strided
        # A batch of gradients, as in autograd's vectorized Jacobians, has the type of a plain tensor.
        and not is_legacy_batchedtensor(t)
        # Zeros that autograd does not materialize have no memory.
        and not t._is_zerotensor()
    )


def is_plain(t: Tensor) -> bool:
    """Whether a tensor's memory holds its elements: no subclass, no nested tensor, no lazy negation."""
    return (type(t) is Tensor or type(t) is nn.Parameter) and not t.is_nested and not t.is_neg()


def pointer(tensor: Tensor | None) -> int | None:
    """The address of the first element, or None where there is no tensor."""
    return None if tensor is None else tensor.data_ptr()


def like(gradient: Tensor, x: Tensor) -> Tensor:
    """Return a gradient with the strides and dtype of x: itself if it has them and can be read, else a copy."""
    if gradient.stride() == x.stride() and gradient.dtype == x.dtype and readable(gradient):
        return gradient
    return torch.empty_like(x).copy_(gradient)


class Form(NamedTuple):
    """Shape, strides and dtype of a tensor that a kernel read, to compare with what autograd returns later."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> Form:
        """The form of a tensor."""
        return cls(t.shape, t.stride(), t.dtype)

    def holds(self, t: Tensor) -> bool:
        """Whether a kernel may read a tensor as one of this form."""
        return t.shape == self.shape and t.stride() == self.strides and t.dtype == self.dtype and readable(t)

    def restore(self, t: Tensor) -> Tensor:
        """Return a tensor in this form: itself if it has it, else a copy, as when hooks on saved tensors changed it."""
        if self.holds(t):
            return t
        if t.shape != self.shape:
            raise BackendError(
                f"a tensor of shape {show(self.shape)} that was saved for backward came back as {show(t.shape)}; "
                "check the hooks on saved tensors"
            )
        return t.new_empty(0, device="cpu", dtype=self.dtype).new_empty_strided(self.shape, self.strides).copy_(t)


class Lanes(NamedTuple):
    """A tensor of (N, C, *) in memory: outer x channels x inner, or outer x inner x channels with channels last."""

    outer: int
    channels: int
    inner: int
    last: bool


def lanes(x: Tensor, axis: int = 1) -> Lanes | None:
    """Find how a tensor with samples on axis 0 lies in memory; None if it is empty, or channels are neither first nor last.

    >>> lanes(torch.ones(2, 3, 4, 5))
    Lanes(outer=2, channels=3, inner=20, last=False)
    >>> lanes(torch.ones(2, 4, 5, 3), axis=3)
    Lanes(outer=2, channels=3, inner=20, last=True)
    """
    if x.numel() == 0:
        return None
    axis %= x.dim()
    outer, channels = x.shape[0], x.shape[axis]
    inner = x.numel() // (outer * channels)
    first = x if axis == 1 else x.movedim(axis, 1)
    if first.is_contiguous():
        return Lanes(outer, channels, inner, False)
    return Lanes(outer, channels, inner, True) if first.movedim(1, -1).is_contiguous() else None


def gradients(
    definition: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Compute gradients by autograd through the definition, for a backward pass that is itself differentiated or transformed."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # With respect to views: where one input was computed from another, the path through that must not count.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        y = definition(*inputs)
    asked = [t for t, wanted in zip(inputs, needed, strict=True) if wanted and t is not None]
    found = iter(torch.autograd.grad(y, asked, dy, create_graph=again))
    return [next(found) if wanted and t is not None else None for t, wanted in zip(inputs, needed, strict=True)]
