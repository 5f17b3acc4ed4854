"""The memory layout of outputs: code that may view the output of torch's layer may view that of ours."""

import torch
from torch import Tensor

from normkit.core.support import Support
from normkit.engine.eager import differentiated

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(support: Support, x: Tensor) -> torch.memory_format:
    """Channels last where the input is, otherwise contiguous, as always after a norm over trailing axes in torch."""
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
