"""What calls of a native kernel have in common beside those for rules: which tensors they take, their layout, their gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.engine.eager import watched
from normkit.engine.library import library

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


class Lanes(NamedTuple):
    """A tensor of (N, C, *) in memory: outer x channels x inner, or outer x inner x channels with channels last."""

    outer: int
    channels: int
    inner: int
    last: bool


def entry(name: str, letters: str) -> Any:
    """A function of the library that returns a status, or None where there is none.

    Args:
        name: of the function.
        letters: a letter an argument: p for a pointer, i for an integer of 64 bits, d for a double.
    """
    function = getattr(library(), name, None)
    if function is not None:
        function.argtypes = [_KINDS[letter] for letter in letters]
        function.restype = ctypes.c_int32
    return function


def checked(status: int) -> None:
    """Raises unless a kernel answered that all is well."""
    if status == 1:
        raise MemoryError("no memory is left for the workspace of a normalization kernel")
    assert status == 0, f"the kernels answered {status}"


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors that a kernel may read, on a CPU, with nothing but eager PyTorch at work.

    >>> plain(torch.ones(2)), plain(torch.ones(2, device="meta"))
    (True, False)
    """
    return not watched() and all(t is None or _readable(t) for t in tensors)


def _readable(t: Tensor) -> bool:
    return (
        t.is_cpu
        and t.dtype in TYPES
        and t.layout == torch.strided
        and (type(t) is Tensor or type(t) is nn.Parameter)
        # Several gradients at a time, as autograd's own vectorized Jacobians have them.
        and not torch._C._functorch.is_legacy_batchedtensor(t)  # pyright: ignore[reportAttributeAccessIssue]
    )


def lanes(x: Tensor, axis: int = 1) -> Lanes | None:
    """How a tensor with samples on axis 0 and channels on another lies in memory, or None if otherwise or empty.

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
    if first.movedim(1, -1).is_contiguous():
        return Lanes(outer, channels, inner, True)
    return None


def like(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient with its elements in memory as those of x."""
    return (
        gradient
        if gradient.stride() == x.stride() and gradient.dtype == x.dtype
        else torch.empty_like(x).copy_(gradient)
    )


def pointer(tensor: Tensor | None) -> int | None:
    """Where the elements are."""
    return None if tensor is None else tensor.data_ptr()


def gradients(
    definition: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Gradients by autograd through the definition: of a backward pass that is to be differentiated, or transformed, itself.

    Args:
        definition: the function of the inputs in PyTorch.
        inputs: tensors, or None.
        needed: which gradients are wanted.
        dy: the gradient of the output.

    Returns:
        A gradient for each input, None where it is not needed.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        y = definition(*inputs)
    asked = [t for t, wanted in zip(inputs, needed, strict=True) if wanted and t is not None]
    found = iter(torch.autograd.grad(y, asked, dy, create_graph=again))
    return [next(found) if wanted and t is not None else None for t, wanted in zip(inputs, needed, strict=True)]
