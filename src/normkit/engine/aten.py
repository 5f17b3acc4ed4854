"""The rules for which torch has a fused kernel of its own, found by their axes and statistic."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core.memory import RunningStatistics
from normkit.core.moments import Moments, accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Split

Ready = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
Kernel = Callable[[float, Split], Ready]


def refusal(
    rule: Rule,
    x: Tensor,
    split: Split,
    weight: Tensor | None,
    bias: Tensor | None,
    measured: bool = False,
    running: RunningStatistics | None = None,
) -> str | None:
    """Why torch has no fused kernel for this call, or None if it has one.

    ``measured`` if the moments are wanted too; ``running`` are the statistics to use in place of the input's own.
    """
    kernel = _kernel(rule)
    if kernel is None:
        return f"torch has no fused kernel for {rule.support} with {rule.statistic.formula()}"
    if measured and kernel is not _batch_norm:
        return "torch's kernel does not hand over the statistics"
    if x.numel() == 0 or (split.count < 2 and running is None):
        return "torch's kernels refuse an input without elements, and statistics of a single one"
    if running is not None and x.dtype.itemsize != 2 and running.mean.dtype != x.dtype:
        return f"torch's kernel does not take a {x.dtype} input with {running.mean.dtype} running statistics"
    for parameter in (weight, bias):
        if parameter is None:
            continue
        mixed = (
            x.device.type == "cpu"
            and x.dtype.itemsize == 2
            and parameter.dtype == torch.float32
            and kernel is not _rms_norm
        )
        if parameter.dtype != x.dtype and not mixed:
            return f"torch's kernels do not take a {x.dtype} input with {parameter.dtype} parameters"
    return None


def prepare(rule: Rule, x: Tensor, split: Split) -> Ready:
    """Torch's fused kernel for a rule on inputs like this one; only where ``refusal`` gave None.

    Args:
        rule: what to compute.
        x: in its own shape, not split.
        split: of the rule's support.

    Returns:
        A function of an input of this shape, a weight and a bias, each of them or None.
    """
    kernel = _kernel(rule)
    assert kernel is not None
    ready = kernel(_eps(rule.statistic, x), split)
    if not _channels_are_last(rule):
        return ready
    return lambda x, weight, bias: _as_last(ready(x.movedim(-1, 1), weight, bias), x)


def measure(rule: Rule, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize over the batch: the output, mean and unbiased variance per channel; only where ``refusal`` gave None."""
    last = _channels_are_last(rule)
    first = x.movedim(-1, 1) if last else x
    # With momentum 1 torch's running statistics are the batch's own: the way to have them from its kernel.
    mean = torch.zeros(first.shape[1], dtype=accumulation_dtype(x.dtype), device=x.device)
    var = torch.zeros_like(mean)
    y = F.batch_norm(first, mean, var, _wide(weight), _wide(bias), True, 1.0, _eps(rule.statistic, x))
    return (_as_last(y, x) if last else y), mean, var


def moments(mean: Tensor, var: Tensor, split: Split) -> Moments:
    """What ``measure`` found, as the split's axes."""
    shape = split.statistics_shape
    return Moments(mean.view(shape), (var * ((split.count - 1) / split.count)).view(shape), split.count)


def normalize_by(
    rule: Rule, x: Tensor, running: RunningStatistics, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Normalize by running statistics per channel and compensate; only where ``refusal`` gave None and the rule has a memory."""
    last = _channels_are_last(rule)
    first = x.movedim(-1, 1) if last else x
    mean, var, weight, bias = (_wide(value) for value in (running.mean, running.var, weight, bias))
    y = F.batch_norm(first, mean, var, weight, bias, False, 0.0, _eps(rule.statistic, x))
    return _as_last(y, x) if last else y


def is_quicker(rule: Rule, x: Tensor, given: bool) -> bool:
    """Whether torch's kernel beats the native one on this input: where the way from Python costs more than the work.

    ``given`` if statistics are given in place of the input's own. The bounds, in elements, are where the two met on two cores of
    an x86-64-v3 processor.
    """
    kernel = _kernel(rule)
    if kernel is _rms_norm:  # on a CPU torch composes it of six operators
        return False
    if kernel is _batch_norm:  # in training torch's own running statistics are poisoned by one broken batch
        return given and not torch.is_grad_enabled() and x.dtype == torch.float32 and x.numel() >= 1 << 16
    wide = x.dtype.itemsize > 2
    rows = kernel is _layer_norm or (kernel is _over_channels and not x.is_contiguous())
    if rows and wide and torch.is_grad_enabled() and x.shape[-1 if kernel is _layer_norm else 1] <= 512:
        return True  # the backward pass over short rows
    if kernel is not _layer_norm and not x.is_contiguous():
        return x.numel() <= 1 << 13
    if not torch.is_grad_enabled():
        return x.numel() <= 1 << 17
    return x.numel() <= (1 << 18 if wide else 1 << 16)


def _as_last(y: Tensor, x: Tensor) -> Tensor:
    """Channels back to the end; contiguous where the input was, as code behind a norm may view its output."""
    y = y.movedim(1, -1)
    return y.contiguous() if x.is_contiguous() else y


def _channels_are_last(rule: Rule) -> bool:
    return rule.support.names[0] == "n" and rule.support.names[-1] == "c"


def _kernel(rule: Rule) -> Kernel | None:
    statistic, compensation = rule.statistic, rule.compensation
    if (
        statistic.guard != "inside"
        or statistic.correction
        or statistic.eps == 0
        or (compensation and compensation.offset)
    ):
        return None
    kind = (statistic.center, statistic.scale)
    trailing = " ".join(name for group in rule.support.groups[1:] for name in group)
    plain = all(len(group) == 1 for group in rule.support.groups)
    if plain and rule.support.names[0] == "*" and rule.support.reduced == frozenset(rule.support.names[1:]):
        if compensation is None or compensation.per == trailing:
            return _TRAILING.get(kind)
    first = rule.support.axes.replace("* c", "c *").replace("* (g c)", "(g c) *")
    kernel, per = _CHANNELS.get((first, rule.support.reduced), (None, ""))
    return kernel if kind == ("mean", "std") and (compensation is None or compensation.per == per) else None


def _eps(statistic: Statistic, x: Tensor) -> float:
    return statistic.epsilon(accumulation_dtype(x.dtype))


def _batch_norm(eps: float, split: Split) -> Ready:
    return lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


def _wide(value: Tensor | None) -> Tensor | None:
    """In at least float32, as torch takes parameters and statistics beside an input of a half type."""
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
    return _in_groups(eps, split.shape[split.names.index("g")] if "g" in split.names else 1)


def _instance_norm(eps: float, split: Split) -> Ready:
    # As groups of one channel: torch's own function goes through batch normalization, and takes three times as long.
    return _in_groups(eps, split.shape[split.names.index("c")])


def _in_groups(eps: float, groups: int) -> Ready:
    def ready(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # In channels-last memory torch's CPU kernel is wrong by more the larger the mean: two copies are the price of accuracy.
        like = memory_format(x)
        x = x.contiguous() if x.device.type == "cpu" else x
        return torch.group_norm(x, groups, weight, bias, eps).contiguous(memory_format=like)

    return ready


def _over_channels(eps: float, split: Split) -> Ready:
    channels = (split.shape[split.names.index("c")],)

    def ready(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = torch.layer_norm(x.movedim(1, -1), channels, weight, bias, eps).movedim(-1, 1)
        return y.contiguous(memory_format=memory_format(x))

    return ready


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that an output should have to be laid out as this input."""
    for like, rank in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if x.dim() == rank and x.is_contiguous(memory_format=like) and not x.is_contiguous():
            return like
    return torch.contiguous_format


_TRAILING: dict[tuple[str | None, str | None], Kernel] = {("mean", "std"): _layer_norm, (None, "rms"): _rms_norm}
_CHANNELS: dict[tuple[str, frozenset[str]], tuple[Kernel, str]] = {
    ("n c *", frozenset("n*")): (_batch_norm, "c"),
    ("n (g c) *", frozenset("c*")): (_group_norm, "(g c)"),
    ("n c *", frozenset("c*")): (_group_norm, "c"),
    ("n c *", frozenset("*")): (_instance_norm, "c"),
    ("n c *", frozenset("c")): (_over_channels, "c"),
}
