"""What a layer keeps of a call: the choice of a back end, and a comparison that tells whether it holds for the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from normkit.engine import native
from normkit.engine.call import Call
from normkit.engine.choose import Choice
from normkit.engine.guard import Check, guard

Quick = Callable[..., Tensor]


class Known(NamedTuple):
    """The choice for a call without mask and residual, valid for calls of the same layer with the same options.

    Only the native back end's is kept, as it does not depend on whether gradients are recorded. ``quick`` is the shortest path
    for a call that updates no running statistics; ``given`` says that it takes them as arguments.
    """

    check: Check
    parts: int
    choice: Choice
    quick: Quick | None
    given: bool

    @classmethod
    def of(cls, call: Call, choice: Choice) -> Known:
        """Keep the choice that was made for a call."""
        tensors = _tensors(call)
        return cls(guard(*tensors), len(tensors), choice, native.quick(choice.perform, call), not call.own)

    def fits(self, *tensors: Tensor | None) -> bool:
        """Whether the choice holds for these: input, weight, bias and, where they are given, running statistics."""
        # The count first: the comparison takes exactly as many tensors as it was made for.
        there = [t for t in tensors if t is not None]
        return len(there) == self.parts and self.check(*there)

    def agrees(self, call: Call) -> bool:
        """Whether the choice holds for this call."""
        tensors = _tensors(call)
        return len(tensors) == self.parts and self.check(*tensors)


def _tensors(call: Call) -> list[Tensor]:
    running = call.running
    among = (call.x, call.weight, call.bias, *(() if running is None else (running.mean, running.var)))
    return [t for t in among if t is not None]
