"""Checks of running statistics: wrong numbers, old numbers, and numbers that will move again."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.catalogue.citation import card_of
from normkit.diagnostics.audit.finding import Row, check
from normkit.diagnostics.audit.observe import Observed, Seen
from normkit.surgery.changes import Changes
from normkit.surgery.freeze import freeze, is_frozen
from normkit.surgery.recalibrate import recalibrate
from normkit.weights.layout import weight_layout, weight_of

_ENOUGH = 16.0  # effective samples, below which a batch says little about running statistics
_SHIFT = 1.0  # standard deviations between running and batch mean, in the median over channels
_RATIO = 4.0  # between running and batch variance, likewise


@check("error", "find the batch that overflowed, then recalibrate(model, batches)", "training")
def running_not_finite(seen: Observed) -> Iterator[Row]:
    """Running statistics with NaN or infinity, which evaluation gives to every output."""
    for norm in seen.norms:
        broken = max((int((~kept.isfinite()).sum()) for kept in _running(norm) if kept is not None), default=0)
        if broken:
            yield norm.label, {"channels": broken}, _again(seen) if norm.calls and norm.over_batch else None


@check("warning", "prune the channel, or raise eps above the noise; recalibrate(model, batches) if it is alive")
def running_tiny(seen: Observed) -> Iterator[Row]:
    """Running variances below eps: evaluation multiplies such a channel's noise by up to 1 / sqrt(eps)."""
    for norm in seen.norms:
        _, var = _running(norm)
        eps = 0.0 if norm.norm is None or var is None else norm.norm.guard(var.dtype)
        if var is not None and (var < eps).any():
            yield norm.label, {"least": float(var.min()), "eps": eps, "channels": int((var < eps).sum())}, None


@check("warning", "recalibrate(model, batches) before evaluation", "training")
def running_stale(seen: Observed) -> Iterator[Row]:
    """Running statistics that are far from the batch's."""
    for norm, shift, ratio, mended in _gaps(seen):
        if not mended:
            yield norm.label, {"mean_shift": shift, "variance_ratio": ratio}, _again(seen)


@check("warning", "condition(model) carries running statistics along; else recalibrate(model, batches)", "training")
def running_of_old_scale(seen: Observed) -> Iterator[Row]:
    """Running statistics of the raw weights behind a layer whose weights are normalized by now."""
    for norm, shift, ratio, mended in _gaps(seen):
        if mended:
            yield norm.label, {"mean_shift": shift, "variance_ratio": ratio, "after_rescaling": mended}, _again(seen)


@check("warning", "surgery.freeze(model) holds it through train()", "evaluation")
def waking_batch_norm(seen: Observed) -> Iterator[Row]:
    """Batch norms that look frozen, and that ``train()`` sets going."""
    trained = any(parameter.requires_grad for parameter in seen.model.parameters())
    for norm in seen.norms:
        own = list(norm.module.parameters(recurse=False))
        held = bool(own) and not any(parameter.requires_grad for parameter in own)
        asleep = not norm.training and seen.model.training
        kept = isinstance(norm.module._buffers.get("running_mean"), Tensor) and not is_frozen(norm.module)
        if kept and trained and (asleep or held) and any(call.training for call in norm.calls):
            fix = partial(freeze, seen.model, norm.is_named, affine=held)
            yield norm.label, {"in_evaluation": int(asleep), "frozen_parameters": len(own) if held else 0}, fix


def _again(seen: Observed) -> Callable[[], Changes]:
    return lambda: recalibrate(seen.model, [seen.batch], forward=lambda *_: seen.run())


def _running(norm: Seen) -> tuple[Tensor | None, Tensor | None]:
    own = norm.module._buffers
    mean, var, std = (own.get(key) for key in ("running_mean", "running_var", "running_std"))
    return mean, std.square() if var is None and std is not None else var


def _gaps(seen: Observed) -> Iterator[tuple[Seen, float, float, float]]:
    """Norms whose running statistics are far from the batch's: by how much, and the ratio that the weight's scale mends it to."""
    for norm in seen.norms:
        calls = [call for call in norm.calls if call.training and call.effective >= _ENOUGH]
        (mean, var), call = _running(norm), calls[0] if len(norm.calls) == len(calls) == 1 else None
        if call is None or call.mean is None or call.var is None or mean is None or var is None:
            continue
        if call.mean.shape != mean.shape or _is_young(norm.module, mean, var) or not (mean + var).isfinite().all():
            continue
        wanted, eps = (call.mean, call.var), 0.0 if norm.norm is None else norm.norm.guard(var.dtype)
        shift, ratio = _gap(mean, var, *wanted, eps)
        if shift > _SHIFT or not 1 / _RATIO < ratio < _RATIO:
            scale = _scale(norm)
            moved, mended = (shift, ratio) if scale is None else _gap(mean * scale, var * scale**2, *wanted, eps)
            yield norm, shift, ratio, mended if moved <= _SHIFT and 1 / _RATIO < mended < _RATIO else 0.0


def _gap(mean: Tensor, var: Tensor, other: Tensor, other_var: Tensor, eps: float) -> tuple[float, float]:
    """How evaluation differs from training: in the mean, by deviations, and in variance, by a factor; both as eps leaves them."""
    wanted = (other_var + eps).clamp(min=1e-30)
    return float(((mean - other).abs() * wanted.rsqrt()).median()), float(((var + eps) / wanted).median())


def _is_young(module: nn.Module, mean: Tensor, var: Tensor) -> bool:
    """Whether a twentieth of running statistics, or half of a small variance, is what they were initialized with."""
    count, momentum = getattr(module, "num_batches_tracked", None), getattr(module, "momentum", None)
    left = 0.0 if count is None or not momentum else (1 - momentum) ** int(count)
    return left > min(0.05, 0.5 * float(var.median())) or count == 0 or (not mean.any() and bool((var == 1).all()))


def _scale(norm: Seen) -> Tensor | None:
    """The norms of the rows of the weight before a norm as it is used, over those of the raw one, where it is parametrized."""
    layer = None if norm.layer is None else norm.layer[1]
    if layer is None or not parametrize.is_parametrized(layer, "weight"):
        return None
    parts = layer.get_submodule("parametrizations.weight")
    raw = getattr(parts, "original", getattr(parts, "original1", None))
    if raw is None or not any((card := card_of(part)) and card.kind == "weight" for part in parts.children()):
        return None
    with torch.no_grad():
        used, before = (weight_layout(layer).matrix(w).norm(dim=1) for w in (weight_of(layer, "weight", "audit"), raw))
    return used / before
