"""Checks of calls: statistics over too little, other layouts, places that share a norm, dead channels, large logits."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.diagnostics.audit.finding import Row, check
from normkit.diagnostics.audit.observe import Observed, Seen
from normkit.surgery.accelerate import accelerate
from normkit.surgery.changes import label

# The means of 16 samples are off by a quarter of a standard deviation; with fewer, accuracy falls (Wu and He 2018, figure 1).
_FEW = 16
_APART = 0.5  # standard deviations between the inputs of two calls; of one distribution they differ by sampling alone
_BYTES = 2**20  # a copy of less takes microseconds
_ROWS = 32  # with fewer elements a channel may be zero by chance
_FAINT = 1e-5  # of the median channel's gradient: tanh at 6.5
_VANISHED = 1e-20  # in a network through which no gradient comes, zero is rounding
_LARGE = 100.0  # where the attention of large models is clipped: Kimi K2's technical report (2025), section 2.1


@check("error", "normalize over more: larger inputs or batches, fewer groups, or a norm over channels such as 'ln'")
def one_element(seen: Observed) -> Iterator[Row]:
    """Sets of one element, which normalize to zero, or to a sign."""
    for norm in seen.norms:
        calls = [call for call in norm.calls if call.elements == 1]
        if calls:
            yield norm.label, {"elements": 1, "sets": math.prod(calls[0].shape)}, None


@check("warning", "audit with the batch of training; if it is this one, convert(model, 'gn') or synchronize the norms")
def small_batch(seen: Observed) -> Iterator[Row]:
    """Batch statistics whose mean is off by more than a quarter of a standard deviation."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    for norm in seen.norms:
        calls = [call for call in norm.calls if call.training and call.elements != 1 and call.samples]
        if calls and (alone or norm.kind != "sync_batch_norm"):
            least = min(calls, key=lambda call: call.effective)
            total = math.prod(least.shape) // least.shape[norm.channel]
            found = least.effective * min(1.0, (least.elements or total) / total)
            if found < _FEW:
                yield norm.label, {"effective_samples": found, "samples": least.samples}, None


@check("warning", "subtract the mean earlier, in float32, or run this norm in a wider dtype")
def large_mean(seen: Observed) -> Iterator[Row]:
    """Inputs whose mean is so far from zero that half of the dtype's digits say nothing of what varies."""
    for norm in seen.norms:
        for call in sorted(norm.calls, key=lambda call: -call.offset)[:1]:
            bound = torch.finfo(call.dtype).eps ** -0.5  # E[x^2] - E[x]^2 has no right digit beyond
            if call.offset > bound:
                yield norm.label, {"mean_over_std": call.offset, "bound": bound}, None


@check("warning", "give each place a batch norm of its own")
def shared_batch_norm(seen: Observed) -> Iterator[Row]:
    """One batch norm called on inputs of different distributions, whose running statistics fit neither."""
    for norm in seen.norms:
        both = [(call.mean, call.var) for call in norm.calls if call.training and norm.keeps_running]
        found = [(mean, var.clamp(min=1e-12)) for mean, var in both if mean is not None and var is not None]
        apart = 0.0
        for mean, var in found[1:]:
            first, spread = found[0]
            shift = float((2 * (first - mean).square() / (spread + var)).mean().sqrt())
            apart = max(apart, shift, float((var / spread).log().median().abs()) / 2)
        if apart > _APART:
            yield norm.label, {"calls": len(found), "deviations_apart": apart}, None


@check("warning", "leave it out of the checkpointed part, or set momentum to 1 - sqrt(1 - momentum)")
def checkpointed_batch_norm(seen: Observed) -> Iterator[Row]:
    """Batch norms that run again in the backward pass, and count each batch twice."""
    for norm in seen.norms:
        if norm.again and norm.over_batch and norm.keeps_running and any(call.training for call in norm.calls):
            yield norm.label, {"calls_forward": len(norm.calls), "calls_backward": norm.again}, None


@check("warning", "reset the biases of these channels, or prune them; a lower learning rate keeps others alive")
def dead_channels(seen: Observed) -> Iterator[Row]:
    """Channels of a norm through which no gradient comes back, or next to none, while it does through others."""
    for norm in seen.norms:
        halves = any(call.dtype == torch.float16 for call in norm.calls)  # in which small gradients are 0
        if norm.gradient is None or norm.rows < _ROWS or halves or _is_untrained_mixture(norm):
            continue
        lively = norm.gradient[norm.gradient > 0]  # none where a gain further on is zero, as residual branches start
        if not lively.numel() or lively.median() < _VANISHED:
            continue
        silent, faint = norm.gradient.numel() - lively.numel(), int((lively < _FAINT * lively.median()).sum())
        if silent + faint:
            yield norm.label, {"dead": silent, "saturated": faint, "channels": norm.gradient.numel()}, None


@check("warning", "normalize queries and keys, as by QueryKeyNorm, or lower the learning rate of their projections")
def attention_logits(seen: Observed) -> Iterator[Row]:
    """Attention without query-key norm whose logits have grown until a few keys take all the weight."""
    for name, (largest, entropy) in seen.attention.items():
        inside = any(norm.name.startswith(f"{name}.") and norm.calls for norm in seen.norms)
        if largest > _LARGE and not inside:
            yield label(name), {"largest_logit": largest, "relative_entropy": entropy}, None


@check("info", "keep one memory format: LayerNorm(C, over='c') on channels-first input, or accelerate(model)", "both")
def layout_copy(seen: Observed) -> Iterator[Row]:
    """Norms that write their output in another memory layout than their input has."""
    for norm in seen.norms:
        moved = max((call.moved for call in norm.calls), default=0)
        if moved >= _BYTES:
            fix = partial(accelerate, seen.model, where=norm.is_named)
            yield norm.label, {"bytes_per_call": moved}, fix if isinstance(norm.module, _InstanceNorm) else None


def _is_untrained_mixture(norm: Seen) -> bool:
    """Whether a norm leaves the mean of a channel as random weights made it: its sets hold several, and its gains are all one."""
    own = [] if norm.norm is None else [norm.norm.weight, norm.norm.bias]
    same = all(value is None or bool((value == value.flatten()[0]).all()) for value in own)
    return same and not (norm.support is not None and norm.support.reduced <= {"n", "b", "*"})
