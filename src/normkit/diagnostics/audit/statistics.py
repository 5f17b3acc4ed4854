"""Checks of calls: statistics over too little, other layouts, places that share a norm, dead channels, large logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from normkit.diagnostics.audit.finding import Number
from normkit.diagnostics.audit.observe import Observed, Seen
from normkit.surgery.accelerate import accelerate
from normkit.surgery.changes import Changes, label
from normkit.surgery.norms import Norm

Row = tuple[str, dict[str, Number], Callable[[], Changes] | None]

# The means of 16 samples are off by a quarter of a standard deviation; with fewer, accuracy falls (Wu and He 2018, figure 1).
_FEW = 16
_APART = 0.5  # standard deviations between the inputs of two calls; of one distribution they differ by sampling alone
_BYTES = 2**20  # a copy of less takes microseconds
_ROWS = 32  # with fewer elements a channel may be zero by chance
_FAINT = 1e-5  # of the median channel's gradient: tanh at 6.5
_LARGE = 100.0  # where the attention of large models is clipped: Kimi K2's technical report (2025), section 2.1


def one_element(seen: Observed) -> Iterator[Row]:
    """Sets of one element, which normalize to zero, or to a sign."""
    for norm in seen.norms:
        calls = [call for call in norm.calls if call.elements == 1]
        if calls:
            yield norm.label, {"elements": 1, "sets": math.prod(calls[0].shape)}, None


def small_batch(seen: Observed) -> Iterator[Row]:
    """Batch statistics whose mean is off by more than a quarter of a standard deviation."""
    for norm in seen.norms:
        calls = [call for call in norm.calls if call.training and call.elements != 1 and call.samples]
        synchronized = norm.norm is not None and norm.norm.kind == "sync_batch_norm"
        if not calls or (synchronized and torch.distributed.is_available() and torch.distributed.is_initialized()):
            continue
        least = min(calls, key=lambda call: call.effective)
        total = math.prod(least.shape) // least.shape[norm.channel]
        share = 1.0 if least.elements is None else min(1.0, least.elements / total)
        if least.effective * share < _FEW:
            yield norm.label, {"effective_samples": least.effective * share, "samples": least.samples}, None


def large_mean(seen: Observed) -> Iterator[Row]:
    """Inputs whose mean is so far from zero that the dtype has no digits left for what varies."""
    for norm in seen.norms:
        for call in sorted(norm.calls, key=lambda call: -call.offset)[:1]:
            bound = torch.finfo(call.dtype).eps ** -0.5
            if call.offset > bound:
                yield (
                    norm.label,
                    {"mean_over_std": call.offset, "bound": bound, "share_of_sets": call.beyond},
                    None,
                )


def layout_copy(seen: Observed) -> Iterator[Row]:
    """Norms that write their output in another memory layout than their input has."""
    for norm in seen.norms:
        moved = max((call.moved for call in norm.calls), default=0)
        if moved >= _BYTES:
            keeps = norm.norm is not None and not norm.module.__module__.startswith("normkit.")
            fix = partial(accelerate, seen.model, where=_only(norm)) if keeps and _stays(norm.norm) else None
            yield norm.label, {"bytes_per_call": moved}, fix


def shared(seen: Observed) -> Iterator[Row]:
    """One batch norm called on inputs of different distributions, whose running statistics fit neither."""
    for norm in seen.norms:
        both = [(call.mean, call.var) for call in norm.calls if call.training]
        found = [(mean, var.clamp(min=1e-12)) for mean, var in both if mean is not None and var is not None]
        if len(found) < 2 or not _keeps_running(norm):
            continue
        (first, spread), apart = found[0], 0.0
        for mean, var in found[1:]:
            shift = float((2 * (first - mean).square() / (spread + var)).mean().sqrt())
            apart = max(apart, shift, float((var / spread).log().median().abs()) / 2)
        if apart > _APART:
            yield norm.label, {"calls": len(found), "deviations_apart": apart}, None


def checkpointed(seen: Observed) -> Iterator[Row]:
    """Batch norms that run again in the backward pass, and count each batch twice."""
    for norm in seen.norms:
        if norm.again and norm.over_batch and _keeps_running(norm) and any(call.training for call in norm.calls):
            yield norm.label, {"calls_forward": len(norm.calls), "calls_backward": norm.again}, None


def dead(seen: Observed) -> Iterator[Row]:
    """Channels of a norm through which no gradient comes back, or next to none, while it does through others."""
    for norm in seen.norms:
        halves = any(call.dtype == torch.float16 for call in norm.calls)  # in which small gradients are 0
        if norm.gradient is None or norm.rows < _ROWS or halves or _is_untrained_mixture(norm):
            continue
        lively = norm.gradient[norm.gradient > 0]
        if not lively.numel():  # a gain of zero further on, as residual branches start with
            continue
        silent = int((norm.gradient == 0).sum())
        faint = int((lively < _FAINT * lively.median()).sum())
        if silent or faint:
            yield norm.label, {"dead": silent, "saturated": faint, "channels": norm.gradient.numel()}, None


def attention_logits(seen: Observed) -> Iterator[Row]:
    """Attention without query-key norm whose logits have grown until a few keys take all the weight."""
    for name, (largest, entropy) in seen.attention.items():
        inside = any(norm.name.startswith(f"{name}.") and norm.calls for norm in seen.norms)
        if largest > _LARGE and not inside:
            yield label(name), {"largest_logit": largest, "relative_entropy": entropy}, None


def _is_untrained_mixture(norm: Seen) -> bool:
    """Whether a norm leaves the mean of a channel as random weights made it: its sets hold several, and its gains are all one."""
    own = [] if norm.norm is None else [norm.norm.weight, norm.norm.bias]
    same = all(value is None or bool((value == value.flatten()[0]).all()) for value in own)
    return same and not (norm.support is not None and norm.support.reduced <= {"n", "b", "*"})


def _keeps_running(norm: Seen) -> bool:
    return any(getattr(norm.module, key, None) is not None for key in ("running_mean", "running_var"))


def _only(norm: Seen) -> Callable[[str, torch.nn.Module], bool]:
    return lambda name, _: name == norm.name


def _stays(norm: Norm | None) -> bool:
    """Whether normkit's layer of this kind writes the layout that it reads."""
    return norm is not None and norm.kind in ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")
