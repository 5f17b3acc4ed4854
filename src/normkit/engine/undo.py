"""Keeping the output in the place of the input: where gain and bias can be undone."""

import torch
from torch import Tensor

from normkit.core.errors import OptionError
from normkit.core.support import show


def check_undone(offset: float, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None) -> None:
    """Refuse gains too small for the normalized input to be computed again from the output.

    The output is rounded by eps (|gain normalized| + |bias|), so (output - bias) / gain by eps (|normalized| + |bias / gain|) and
    a little more. Half of the digits are left where |gain| >= sqrt(eps) |bias|. Numbers below the normal ones have fewer digits:
    those of |gain| >= tiny / sqrt(eps) keep half of theirs down to normalized inputs of sqrt(eps).
    """
    given = weight if weight is not None else bias
    if given is None:
        return
    info, gain = torch.finfo(dtype), torch.ones_like(given) if weight is None else weight.detach() + offset
    least = info.tiny / info.eps**0.5
    wanted = gain.new_full((), least) if bias is None else (bias.detach().abs() * info.eps**0.5).clamp_min(least)
    small = gain.abs() < wanted
    if small.any():
        at = int(small.flatten().nonzero()[0])
        limits = wanted.expand_as(small).flatten()
        raise OptionError(
            f'save="output" can\'t undo a gain of {gain.flatten()[at].item():.3g} (element {at} of {show(given.shape)}, '
            f"{int(small.sum())} are too small), wanted at least {limits[at].item():.3g} in {dtype}, so that half of the digits "
            'are left; use save="input" for this layer'
        )
