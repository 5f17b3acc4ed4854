"""A single comparison for repeated calls: whether tensors look, to a kernel, like those that a choice was made for.

It is the comparison in C++ with which torch.compile guards its graphs: type, dispatch keys (device, layout, negation, nesting,
subclasses, active modes and transforms), dtype, sizes and strides. It is internal to torch; where it is missing or does not
answer as expected, every call takes the slower path through :meth:`Call.key`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Check = Callable[..., bool]


def _never(*tensors: Any) -> bool:
    return False


def guard(*tensors: Tensor) -> Check:
    """Return a function of as many tensors that tells whether they are like these; False where the comparison is missing.

    It does not see a tangent of forward mode; :func:`calm` does. No tensor may be nested: torch would abort.
    """
    if _Guards is None:
        return _never
    # All sizes and strides are given, so all are compared; a None among them would match any.
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def calm() -> bool:
    """Whether neither a compiler nor forward mode is active, of which :func:`guard` sees neither."""
    # An internal count, as torch has no public question for it; a level from 0 says that tangents may be about.
    return not is_compiling() and forward_ad._current_level < 0


def _found() -> Any:
    try:
        from torch._C._dynamo.guards import TensorGuards

        made: Any = TensorGuards
        # Tried once rather than trusted: an internal class may change what it takes, or what it compares.
        one = torch.ones(2)
        check = made(one, dynamic_dims_sizes=[[2]], dynamic_dims_strides=[[1]]).check
        if check(torch.zeros(2)) and not check(torch.ones(3)) and not check(one.double()):
            return made
    except (ImportError, AttributeError, TypeError, RuntimeError, SystemError):
        pass
    return None


_Guards: Any = _found()
