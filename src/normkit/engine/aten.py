"""The rules that one of torch's fused kernels computes, found by their axes and statistic.

These kernels run where the native library is missing, and on other devices. No user gets what torch's kernels are known to
compute wrongly: those calls are refused here and run by the definition, or wrapped in :class:`_RightTwice`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core.memory import RunningStatistics
from normkit.core.moments import Moments, accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.support import Split, place
from normkit.engine import closed_form
from normkit.engine.abi import gradients
from normkit.engine.call import Call, Output, finish, summed
from normkit.engine.eager import differentiated, recorded
from normkit.engine.reference import activate, normalize_by

Ready = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
Kernel = Callable[[float, Split], Ready]


def refusal(call: Call, split: Split) -> str | None:
    """Reason torch has no fused kernel for this call, or none that is right, or None if it has one."""
    rule, x = call.rule, call.x
    kernel = _kernel(rule)
    if kernel is None:
        return f"torch has no fused kernel for {rule.support} with {rule.statistic.formula()}"
    if call.mask is not None:
        return "torch's kernels take no mask"
    if call.wants_moments and kernel is not _batch_norm:
        return "torch's kernel does not return the statistics"
    if x.numel() == 0 or (split.count < 2 and call.own):
        return "torch's kernels refuse an input without elements, and statistics of a single one"
    if differentiated():
        return "torch's kernels are wrong in nested forward mode and beyond second derivatives"
    if not call.own:
        assert call.running is not None
        if x.dtype.itemsize != 2 and call.running.mean.dtype != x.dtype:
            return f"torch's kernel does not take a {x.dtype} input with {call.running.mean.dtype} running statistics"
    # A sum kept in a half type stops growing once its terms are smaller than its last digit.
    half = x.device.type == "cpu" and x.dtype.itemsize == 2
    parameters = [p for p in (call.weight, call.bias) if p is not None]
    if half and torch.is_grad_enabled():
        return f"torch's CPU kernels sum gradients in {x.dtype}"
    if kernel in (_group_norm, _instance_norm) and x.device.type == "cpu" and not x.is_contiguous():
        return "torch's CPU kernel loses accuracy next to a large mean unless the input is contiguous"
    for parameter in parameters:
        mixed = half and parameter.dtype == torch.float32 and kernel is not _rms_norm
        if parameter.dtype != x.dtype and not mixed:
            return f"torch's kernels do not take a {x.dtype} input with {parameter.dtype} parameters"
        if parameter.device != x.device:
            return f"torch's kernels do not take parameters on {parameter.device} with an input on {x.device}"
    return None


def perform(call: Call, split: Split) -> Output:
    """Run a call on torch's kernel; only where ``refusal`` returned None."""
    x, total = summed(call)
    # torch's batch norm does not return its statistics, but it can be made to write them to running ones.
    found = call.running if not call.own else _room(call, x) if call.wants_moments else None
    ready = _ready(call, x, split, found)
    # A compiler or jit.trace would not see into the node; it traces the kernel's own backward, which is right once.
    if torch.is_grad_enabled() and not recorded():
        y: Any = _RightTwice.apply(x, call.weight, call.bias, ready, partial(_define, call, split))
    else:
        y = ready(x, call.weight, call.bias)
    moments = None
    if call.own and found is not None:
        # torch writes the unbiased variance, moments hold the population's.
        shape, biased = split.statistics_shape, (split.count - 1) / split.count
        moments = Moments(found.mean.view(shape), (found.var * biased).view(shape), split.count)
    return Output(finish(activate(y, call.activation), call), total, moments)


def _ready(call: Call, x: Tensor, split: Split, found: RunningStatistics | None) -> Ready:
    """Return torch's fused kernel for inputs like this one; batch normalization's uses given statistics, or measures them."""
    kernel = _kernel(call.rule)
    assert kernel is not None
    eps = call.rule.statistic.epsilon(accumulation_dtype(x.dtype))
    ready = kernel(eps, split) if found is None else _by(found, call.own, eps)
    if not _channels_are_last(call.rule):
        return ready
    return lambda x, weight, bias: ready(x.movedim(-1, 1), weight, bias).movedim(1, -1)


def _room(call: Call, x: Tensor) -> RunningStatistics:
    """Allocate the statistics to measure, one number per channel."""
    channels = x.shape[-1 if _channels_are_last(call.rule) else 1]
    mean = torch.zeros(channels, dtype=accumulation_dtype(x.dtype), device=x.device)
    return RunningStatistics(mean, torch.zeros_like(mean))


def _define(call: Call, split: Split, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What the kernel computes, differentiable to any order."""
    rule, parts, running = call.rule, x.reshape(split.shape), call.running
    if call.own:
        y = closed_form.normalize(parts, split, rule.statistic)[0]
        y = y if rule.compensation is None else rule.compensation.apply(y, split, weight, bias)
    else:
        assert running is not None
        assert rule.memory is not None
        mean, var = (place(value, rule.memory.per, split) for value in (running.mean, running.var))
        y = normalize_by(rule, parts, split, mean, var, weight, bias)
    return y.reshape(x.shape).to(x.dtype)


class _RightTwice(torch.autograd.Function):
    """One of torch's kernels with a second derivative that is right: torch's own takes the statistics for constants.

    Backward runs the kernel again and differentiates that: a graph stored in this node would outlive the backward pass, and hold
    what checkpointing is meant to free.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.ready, ctx.definition = inputs
        ctx.save_for_backward(*tensors)
        return ctx.ready(*tensors)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        function = ctx.definition if torch.is_grad_enabled() else ctx.ready
        return *gradients(function, tensors, needed, arrived[0]), None, None


def _channels_are_last(rule: Rule) -> bool:
    return rule.support.names[0] == "n" and rule.support.names[-1] == "c"


def _kernel(rule: Rule) -> Kernel | None:
    statistic, compensation = rule.statistic, rule.compensation
    # torch's kernels add eps inside the root and divide by n.
    if (
        statistic.guard != "inside"
        or statistic.correction
        or statistic.eps == 0
        or (compensation and compensation.offset)
    ):
        return None
    kind = (statistic.center, statistic.scale)
    trailing = " ".join(name for group in rule.support.groups[1:] for name in group)
    # By axes and statistic, not by method: a user's own rule with the same ones gets the kernel too.
    plain = all(len(group) == 1 for group in rule.support.groups)
    if plain and rule.support.names[0] == "*" and rule.support.reduced == frozenset(rule.support.names[1:]):
        if compensation is None or compensation.per == trailing:
            return _TRAILING.get(kind)
    first = rule.support.axes.replace("* c", "c *").replace("* (g c)", "(g c) *")
    kernel, per = _CHANNELS.get((first, rule.support.reduced), (None, ""))
    return kernel if kind == ("mean", "std") and (compensation is None or compensation.per == per) else None


def _batch_norm(eps: float, split: Split) -> Ready:
    return lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


def _by(found: RunningStatistics, own: bool, eps: float) -> Ready:
    """Batch normalization by given statistics, or by its own, which it writes to ``found``: momentum 1 replaces the old."""
    mean, var = _wide(found.mean), _wide(found.var)
    momentum = 1.0 if own else 0.0
    return lambda x, weight, bias: F.batch_norm(x, mean, var, _wide(weight), _wide(bias), own, momentum, eps)


def _wide(value: Tensor | None) -> Tensor | None:
    """Convert to at least float32, as torch accepts parameters and statistics for an input of a half type."""
    return None if value is None else value.to(accumulation_dtype(value.dtype))


def _layer_norm(eps: float, split: Split) -> Ready:
    features = split.shape[split.dims[0] :]
    return lambda x, weight, bias: torch.layer_norm(x, features, weight, bias, eps)


def _rms_norm(eps: float, split: Split) -> Ready:
    features = split.shape[split.dims[0] :]

    def ready(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = torch.rms_norm(x, features, weight, eps)
        return y if bias is None else y + bias

    return ready


def _group_norm(eps: float, split: Split) -> Ready:
    groups = split.shape[split.names.index("g")] if "g" in split.names else 1
    return lambda x, weight, bias: torch.group_norm(x, groups, weight, bias, eps)


def _instance_norm(eps: float, split: Split) -> Ready:
    # As groups of one channel: torch's own function calls batch normalization on a reshaped batch, and takes three times as long.
    channels = split.shape[split.names.index("c")]
    return lambda x, weight, bias: torch.group_norm(x, channels, weight, bias, eps)


def _over_channels(eps: float, split: Split) -> Ready:
    channels = (split.shape[split.names.index("c")],)
    return lambda x, weight, bias: torch.layer_norm(x.movedim(1, -1), channels, weight, bias, eps).movedim(-1, 1)


_TRAILING: dict[tuple[str | None, str | None], Kernel] = {("mean", "std"): _layer_norm, (None, "rms"): _rms_norm}
_CHANNELS: dict[tuple[str, frozenset[str]], tuple[Kernel, str]] = {
    ("n c *", frozenset("n*")): (_batch_norm, "c"),
    ("n (g c) *", frozenset("c*")): (_group_norm, "(g c)"),
    ("n c *", frozenset("c*")): (_group_norm, "c"),
    ("n c *", frozenset("*")): (_instance_norm, "c"),
    ("n c *", frozenset("c")): (_over_channels, "c"),
}
