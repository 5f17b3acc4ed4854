"""Full precision for a method's own matrix products, under autocast too."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast, in which matrix products keep the dtype of their operands.

    Args:
        x: a tensor on the device of the products.

    Returns:
        A context manager.

    >>> x = torch.tensor([[1.0, 2.0**-10]])
    >>> with torch.autocast("cpu", torch.bfloat16), full_precision(x):
    ...     x @ x.mT
    tensor([[1.0000]])
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     (x @ x.mT).dtype
    torch.bfloat16
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
