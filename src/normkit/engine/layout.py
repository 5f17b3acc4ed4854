"""The memory layout of outputs: code that may view the output of torch's layer may view that of ours."""

import torch
from torch import Tensor

from normkit.core.support import Support
from normkit.engine.eager import differentiated

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(support: Support, x: Tensor) -> torch.memory_format:
    """The memory format of the output for this input: channels last where the input's is, otherwise contiguous.

    A norm over trailing axes returns contiguous outputs, as torch's layer norm does.

    >>> image = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    >>> memory_format(Support("n c *", over="n *"), image), memory_format(Support("* d", over="d"), image)
    (torch.channels_last, torch.contiguous_format)
    """
    like = _CHANNELS_LAST.get(x.dim())
    if like is None or support.names[0] == "*" or x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=like):
        return like
    # A slice of a channels-last image counts too: channels innermost, then positions from the last to the first, then samples.
    strides = [x.stride(d) for d in (1, *range(x.dim() - 1, 1, -1), 0)]
    sliced = 0 < strides[0] < strides[1] and strides == sorted(strides)
    return like if sliced else torch.contiguous_format


def laid_out(y: Tensor, support: Support, x: Tensor) -> Tensor:
    """Bring the output to the memory format that matches its input; not under ``torch.func``, which has no formats."""
    if y.is_contiguous() and x.is_contiguous():
        return y
    return y if differentiated() else y.contiguous(memory_format=memory_format(support, x))
