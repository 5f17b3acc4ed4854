"""One call of the engine: everything that decides how it runs and what it computes."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from normkit.core.memory import RunningStatistics
from normkit.core.moments import Moments
from normkit.core.rule import Rule
from normkit.engine.abi import is_plain
from normkit.engine.eager import watched
from normkit.engine.layout import laid_out

Backend = Literal["auto", "reference", "closed", "aten", "native"]
Activation = Literal["relu", "leaky_relu", "silu", "gelu", "gelu_tanh"]
Save = Literal["input", "output"]  # what is kept for the backward pass


class Call(NamedTuple):
    """What one call computes.

    ``own`` says whether the input's own statistics are used; then ``running``, where given, is updated in place. Otherwise
    ``running`` replaces them. ``measured`` asks for the moments too.
    """

    rule: Rule
    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    running: RunningStatistics | None = None
    own: bool = True
    mask: Tensor | None = None
    activation: str | None = None
    measured: bool = False
    backend: str = "auto"
    save: Save = "input"

    @property
    def wants_moments(self) -> bool:
        """Whether a back end must return the moments."""
        return self.measured or (self.own and self.running is not None)

    def key(self) -> tuple[Any, ...] | None:
        """All that the choice of a back end depends on besides the rule; None where the choice must not be cached.

        Nothing is cached while a compiler, transform or mode is active, nor for subclasses of Tensor: there the choice depends
        on more than can be listed. Autocast is not in the key, as the output always has the input's dtype.
        """
        _, x, weight, bias, residual, running, own, mask, activation, measured, backend, save = self
        others = (weight, bias, residual, *(running or ())[:2])
        if watched() or mask is not None or not is_plain(x) or not all(t is None or is_plain(t) for t in others):
            return None
        return (
            x.shape,
            x.stride(),
            x.dtype,
            x.device,
            None if weight is None else _signature(weight),
            None if bias is None else _signature(bias),
            None if residual is None else _signature(residual),
            None if running is None else (_signature(running.mean), _signature(running.var)),
            own,
            activation,
            measured,
            backend,
            save,
            torch.is_grad_enabled(),
        )


def _signature(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device, t.is_contiguous()


class Output(NamedTuple):
    """What a back end returns: the output, x + residual if there is one, and the moments if they are wanted.

    Moments have one axis for each axis of the split, reduced ones of size 1. ``remembered`` says that the running statistics
    have been updated already.
    """

    y: Tensor
    total: Tensor | None = None
    moments: Moments | None = None
    remembered: bool = False


def summed(call: Call) -> tuple[Tensor, Tensor | None]:
    """The tensor to normalize, and x + residual if there is a residual."""
    if call.residual is None:
        return call.x, None
    total = call.x + call.residual
    return total, total


def finish(y: Tensor, call: Call) -> Tensor:
    """Bring a split output to the input's shape and dtype, and the memory format that matches it."""
    x = call.x
    y = y.reshape(x.shape)
    return laid_out(y if y.dtype == x.dtype else y.to(x.dtype), call.rule.support, x)
