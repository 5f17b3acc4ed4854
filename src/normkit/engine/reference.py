"""The reference: a rule in plain PyTorch, on any device, dtype and layout, differentiable any number of times.

This file defines what a rule computes. Every faster form is tested against it.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core.errors import OptionError, ShapeError
from normkit.core.moments import Moments, accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.support import Split, place, show
from normkit.engine.call import Call, Output, finish, summed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation of this name, one of ``ACTIVATIONS``; None leaves y as it is."""
    return y if activation is None else ACTIVATIONS[activation](y)


def check_activation(activation: str | None) -> None:
    """Refuse an activation that is neither None nor one of ``ACTIVATIONS``, by OptionError."""
    if activation is not None and activation not in ACTIVATIONS:
        raise OptionError(f"activation={activation!r}: wanted one of {', '.join(ACTIVATIONS)}, or None")


def perform(call: Call, split: Split) -> Output:
    """Run a call by the definition."""
    rule, running = call.rule, call.running
    x, total = summed(call)
    mask = _split_mask(call.mask, x, split)
    parts, moments = x.reshape(split.shape), None
    if call.own:
        y, moments = normalize(rule, parts, split, call.weight, call.bias, mask)
    else:
        assert running is not None
        assert rule.memory is not None
        mean = place(running.mean, rule.memory.per, split)
        var = None if rule.statistic.scale is None else place(running.var, rule.memory.per, split)
        real = (
            parts if mask is None else torch.where(mask, parts, 0.0)
        )  # NaN in padding would reach the weight's gradient
        y = normalize_by(rule, real, split, mean, var, call.weight, call.bias)
        y = y if mask is None else torch.where(mask, y, 0.0)
    return Output(finish(activate(y, call.activation), call), total, moments)


def _split_mask(mask: Tensor | None, x: Tensor, split: Split) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise OptionError(f"mask is {mask.dtype}; wanted torch.bool, True where an element counts, e.g. mask.bool()")
    try:
        return mask.expand(x.shape).reshape(split.shape)
    except RuntimeError:
        raise ShapeError(
            f"mask of shape {show(mask.shape)} does not broadcast over an input of {show(x.shape)}; "
            "give it the same number of axes"
        ) from None


def normalize(
    rule: Rule, x: Tensor, split: Split, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None = None
) -> tuple[Tensor, Moments | None]:
    """Normalize by the input's own statistics and compensate, in the accumulation dtype; moments where the statistic has them."""
    if mask is not None:
        x = torch.where(mask, x, 0.0)  # so that a NaN in the padding reaches neither the output nor a gradient
    center, scale, moments = rule.statistic.measure(x, split, mask)
    y = _compensated(rule, x, split, center, scale, weight, bias)
    return (y if mask is None else torch.where(mask, y, 0.0)), moments


def normalize_by(
    rule: Rule, x: Tensor, split: Split, mean: Tensor, var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Normalize by given statistics, one mean and variance (or none) per axis of the rule's memory, and compensate."""
    scale = None if var is None else rule.statistic.guarded(var, power=2)
    return _compensated(rule, x, split, mean, scale, weight, bias)


def _compensated(
    rule: Rule,
    x: Tensor,
    split: Split,
    center: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    y = x.to(accumulation_dtype(x.dtype))
    if center is not None:
        y = y - center
    if scale is not None:
        y = y / scale
    if rule.compensation is not None:
        y = rule.compensation.apply(y, split, weight, bias)
    return y.clone() if y is x else y  # a caller may write into its output, which must not be the input
