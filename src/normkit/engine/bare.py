"""The native kernels for a rule whose weight and bias they do not know, such as those of each sample with channels last.

The kernel normalizes and one operator of PyTorch compensates: two passes, where the definition takes four or more. Half types,
which would be rounded between the two, stay with the definition.
"""

from dataclasses import replace

import torch
from torch import Tensor

from normkit.core.compensation import Affine
from normkit.core.support import Split, place
from normkit.engine import native
from normkit.engine.call import Call, Output, finish, summed
from normkit.engine.prepared import Prepared, prepare
from normkit.engine.reference import activate


def prepare_bare(call: Call, split: Split) -> Prepared | str | None:
    """Prepare the call's rule without its compensation; None where there is none, or a half type would be rounded before it."""
    if call.rule.compensation is None or (call.weight is None and call.bias is None) or call.x.itemsize < 4:
        return None
    bare = replace(call.rule, compensation=None)
    return prepare(bare, call.x, split, None, None, None, call.running, not call.own)


def perform(ready: Prepared, call: Call) -> Output:
    """Run a call by the kernel without its compensation, and compensate."""
    x, total = summed(call)
    bare = call._replace(rule=ready.rule, x=x, weight=None, bias=None, residual=None, activation=None)
    found = (native.perform if call.own else native.perform_by)(ready, bare)
    assert call.rule.compensation is not None
    y = _compensated(call.rule.compensation, found.y.reshape(ready.split.shape), ready.split, call.weight, call.bias)
    return found._replace(y=finish(activate(y, call.activation), call), total=total)


def _compensated(affine: Affine, y: Tensor, split: Split, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None or bias is None:
        return affine.apply(y, split, weight, bias)
    gain, shift = (place(p, affine.per, split) for p in (weight, bias))
    gain = gain + affine.offset if affine.offset else gain
    return torch.addcmul(shift.to(y.dtype), y, gain.to(y.dtype))
