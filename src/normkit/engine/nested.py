"""Rules on strided nested tensors, which have no shape of their own: each tensor inside is normalized by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from normkit.core.errors import ShapeError
from normkit.core.support import Split
from normkit.engine.call import Call, Output


def split(call: Call) -> Split:
    """The split of the first tensor inside; of none, that of nothing.

    Raises:
        ShapeError: a statistic is shared by several of the tensors, or what goes with them would have to be nested too.
    """
    support = call.rule.support
    if support.names[0] != "*" and support.groups[0][-1] in support.reduced:
        raise ShapeError(
            f"{support}: a statistic over the batch of a nested tensor; use nested jagged layout, or pad it and give a mask"
        )
    if call.residual is not None or call.running is not None or call.mask is not None:
        raise ShapeError("a nested tensor takes no residual, mask or running statistics; give its tensors one by one")
    inside = call.x.unbind()
    return support.split(inside[0][None].shape) if inside else Split((), (), ())


def perform(call: Call, each: Callable[[Call], Output]) -> Output:
    """Run a call on each tensor inside."""
    parts = [each(call._replace(x=inside[None])).y[0] for inside in call.x.unbind()]
    return Output(torch.nested.as_nested_tensor(parts, dtype=call.x.dtype, device=call.x.device, layout=torch.strided))
