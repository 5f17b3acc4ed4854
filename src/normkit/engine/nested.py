"""Rules on nested tensors, which have no single shape: each tensor inside is normalized separately."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.core.errors import ShapeError
from normkit.core.support import Split
from normkit.engine.call import Call, Output


def applies(call: Call) -> bool:
    """Whether this file runs a call: on strided nested tensors, and on jagged ones whose tokens are normalized separately."""
    x, support = call.x, call.rule.support
    if not x.is_nested or x.layout == torch.strided:
        return x.is_nested
    # Where tokens are normalized separately, all tokens of a jagged tensor are one batch.
    alone = support.names[0] == "*" and "*" not in support.reduced and len(support.groups) <= x.dim() - _ragged(x)
    return alone and call.residual is None and call.running is None and call.mask is None


def _ragged(x: Tensor) -> int:
    # Private, but torch has no public name for the ragged axis.
    return x._ragged_idx  # pyright: ignore[reportAttributeAccessIssue]


def split(call: Call) -> Split:
    """The split of the first tensor inside, or an empty one; ShapeError where tensors inside would share a statistic."""
    support = call.rule.support
    if support.names[0] != "*" and support.groups[0][-1] in support.reduced:
        raise ShapeError(
            f"{support}: a statistic over the batch of a nested tensor; use nested jagged layout, or pad it and give a mask"
        )
    if call.residual is not None or call.running is not None or call.mask is not None:
        raise ShapeError("a nested tensor takes no residual, mask or running statistics; pass its tensors one by one")
    if call.x.layout == torch.jagged:
        return support.split(call.x.values().shape)
    inside = call.x.unbind()
    return support.split(inside[0][None].shape) if inside else Split((), (), ())


def perform(call: Call, each: Callable[[Call], Output]) -> Output:
    """Run a call on each tensor inside; on all tokens of a jagged one at once."""
    x: Any = call.x
    if x.layout == torch.jagged:
        y = each(call._replace(x=x.values())).y
        return Output(torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths(), _ragged(x)))  # pyright: ignore[reportAttributeAccessIssue]
    parts = [each(call._replace(x=inside[None])).y[0] for inside in call.x.unbind()]
    return Output(torch.nested.as_nested_tensor(parts, dtype=call.x.dtype, device=call.x.device, layout=torch.strided))
