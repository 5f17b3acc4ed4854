"""Checks of running statistics: wrong numbers, old numbers, and numbers that will move again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.catalogue.citation import card_of
from normkit.diagnostics.audit.finding import Number
from normkit.diagnostics.audit.observe import Observed, Seen
from normkit.diagnostics.audit.statistics import Row
from normkit.surgery.changes import Changes
from normkit.surgery.freeze import freeze, is_frozen
from normkit.surgery.recalibrate import recalibrate
from normkit.weights.layout import weight_layout, weight_of

_ENOUGH = 16.0  # effective samples, below which a batch says little about running statistics
_SHIFT = 1.0  # standard deviations between running and batch mean, in the median over channels
_RATIO = 4.0  # between running and batch variance, likewise


def not_finite(seen: Observed) -> Iterator[Row]:
    """Running statistics with NaN or infinity, which evaluation gives to every output."""
    for norm in seen.norms:
        broken = [int((~kept.isfinite()).sum()) for kept in _running(norm) if kept is not None]
        if any(broken):
            mends = norm.over_batch and all(call.mean is not None and _finite(call.mean) for call in norm.calls)
            yield norm.label, {"channels": max(broken)}, _again(seen) if mends and norm.calls else None


def tiny(seen: Observed) -> Iterator[Row]:
    """Running variances below eps: evaluation multiplies such a channel's noise by up to 1 / sqrt(eps)."""
    for norm in seen.norms:
        _, var = _running(norm)
        if var is None or norm.norm is None or not _finite(var):
            continue
        eps = norm.norm.guard(var.dtype)
        small = int((var < eps).sum())
        if small:
            yield norm.label, {"least": float(var.min()), "eps": eps, "channels": small}, None


def stale(seen: Observed) -> Iterator[Row]:
    """Running statistics that are far from the batch's."""
    for norm, shift, ratio, old in _gaps(seen):
        if not old:
            count = getattr(norm.module, "num_batches_tracked", None)
            numbers = {"mean_shift": shift, "variance_ratio": ratio}
            yield norm.label, numbers | ({} if count is None else {"batches_tracked": int(count)}), _again(seen)


def old_scale(seen: Observed) -> Iterator[Row]:
    """Running statistics of the raw weights behind a layer whose weights are normalized by now."""
    for norm, shift, ratio, old in _gaps(seen):
        if old:
            yield norm.label, {"mean_shift": shift, "variance_ratio": ratio, "after_rescaling": old}, _again(seen)


def waking(seen: Observed) -> Iterator[Row]:
    """Batch norms that look frozen, and that ``train()`` sets going."""
    trained = any(parameter.requires_grad for parameter in seen.model.parameters())
    for norm in seen.norms:
        own = list(norm.module.parameters(recurse=False))
        held = bool(own) and not any(parameter.requires_grad for parameter in own)
        asleep = not norm.training and seen.model.training
        if (
            isinstance(norm.module._buffers.get("running_mean"), Tensor)
            and any(call.training for call in norm.calls)
            and not is_frozen(norm.module)
            and trained
            and (asleep or held)
        ):
            numbers: dict[str, Number] = {"in_evaluation": int(asleep), "frozen_parameters": len(own) if held else 0}
            yield norm.label, numbers, partial(freeze, seen.model, _named(norm.name), affine=held)


def _named(wanted: str) -> Callable[[str, nn.Module], bool]:
    return lambda name, _: name == wanted


def _again(seen: Observed) -> Callable[[], Changes]:
    def forward(model: nn.Module, batch: Any) -> Any:
        return seen.run()

    return lambda: recalibrate(seen.model, [seen.batch], forward=forward)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _running(norm: Seen) -> tuple[Tensor | None, Tensor | None]:
    own = norm.module._buffers
    mean, var, std = (own.get(key) for key in ("running_mean", "running_var", "running_std"))
    return mean, std.square() if var is None and std is not None else var


def _gaps(seen: Observed) -> Iterator[tuple[Seen, float, float, float]]:
    """Norms whose running statistics are far from the batch's: by how much, and the ratio that the weight's scale mends it to."""
    for norm in seen.norms:
        calls = [call for call in norm.calls if call.training and call.effective >= _ENOUGH]
        mean, var = _running(norm)
        if len(norm.calls) != 1 or not calls or mean is None or var is None or not (_finite(mean) and _finite(var)):
            continue
        call = calls[0]
        if call.mean is None or call.var is None or call.mean.shape != mean.shape or _is_young(norm.module, mean, var):
            continue
        shift, ratio = _gap(mean, var, call.mean, call.var)
        if shift > _SHIFT or not 1 / _RATIO < ratio < _RATIO:
            scale = _scale(norm)
            rescaled = 0.0
            if scale is not None:
                moved, rescaled = _gap(mean * scale, var * scale.square(), call.mean, call.var)
                good = moved <= _SHIFT and 1 / _RATIO < rescaled < _RATIO
                rescaled = rescaled if good else 0.0
            yield norm, shift, ratio, rescaled


def _is_young(module: nn.Module, mean: Tensor, var: Tensor) -> bool:
    """Whether more than a twentieth of running statistics is what they were initialized with."""
    count, momentum = getattr(module, "num_batches_tracked", None), getattr(module, "momentum", None)
    left = 0.0 if count is None or not momentum else (1 - momentum) ** int(count)
    return left > 0.05 or count == 0 or (not mean.any() and bool((var == 1).all()))


def _gap(mean: Tensor, var: Tensor, other: Tensor, other_var: Tensor) -> tuple[float, float]:
    shift = (mean - other).abs() * other_var.clamp(min=1e-12).rsqrt()
    return float(shift.median()), float((var.clamp(min=1e-12) / other_var.clamp(min=1e-12)).median())


def _scale(norm: Seen) -> Tensor | None:
    """The norms of the rows of the weight before a norm as it is used, over those of the raw one, where it is parametrized."""
    layer = None if norm.layer is None else norm.layer[1]
    if layer is None or not parametrize.is_parametrized(layer, "weight"):
        return None
    parts = layer.get_submodule("parametrizations.weight")
    if not any((card := card_of(part)) is not None and card.kind == "weight" for part in parts.children()):
        return None
    raw = getattr(parts, "original", getattr(parts, "original1", None))
    layout = weight_layout(layer, "weight")
    assert isinstance(raw, Tensor)
    with torch.no_grad():
        used, before = (layout.matrix(each.detach()).norm(dim=1) for each in (weight_of(layer, "weight", "audit"), raw))
    return used / before
