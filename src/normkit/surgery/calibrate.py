"""Gain and bias of new norms fitted to what the old ones gave, by least squares."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.errors import SurgeryError
from normkit.surgery.changes import Change, label
from normkit.surgery.norms import read_norm
from normkit.surgery.recalibrate import forward_batch
from normkit.surgery.watch import tensors_in


class Calibration:
    """Sums over batches, of a model as it was, by which new norms are fitted.

    For each channel, with z what a new norm gives for the old one's input without gain and bias, and y what the old one gave,

        gain = cov(z, y) / var(z),  bias = mean(y) - gain mean(z)

    which is the least error that a gain and a bias can leave on these batches.

    Args:
        model: as it was; it is run in evaluation.
        pairs: the old and the new norm by name; those of which it is not known how to fit are left as they are.
        batches: of inputs, as for ``recalibrate``.
    """

    def __init__(
        self, model: nn.Module, pairs: Mapping[str, tuple[nn.Module, nn.Module]], batches: Iterable[Any]
    ) -> None:
        self._batches = list(batches)
        if not self._batches:
            raise SurgeryError(
                "convert: calibrate has no batches; a generator can be walked only once, give a fresh one"
            )
        self._new = {name: new for name, (_, new) in pairs.items() if _can_be_fitted(new)}
        self._sums: dict[str, Tensor] = {}
        handles = [old.register_forward_hook(self._see(name)) for name, (old, _) in pairs.items() if name in self._new]
        try:
            self._wanted = self._outputs(model)
        finally:
            for handle in handles:
                handle.remove()

    @property
    def written(self) -> list[Tensor]:
        """The parameters that fitting writes into."""
        return [p for norm in self._new.values() for p in norm.parameters(recurse=False)]

    def fit(self, model: nn.Module, rows: Mapping[str, Change]) -> list[Change]:
        """Fit the norms of a changed model; its rows with each layer's error, and one with the error of the whole."""
        before, notes = self._error(model), dict[str, tuple[str, float]]()
        for name, norm in self._new.items():
            if name in self._sums and name in rows:
                notes[name] = self._fit_one(norm, self._sums[name])
        told = {
            name: replace(row.with_note(notes[name][0]), error=notes[name][1])
            for name, row in rows.items()
            if name in notes
        }
        whole = Change(
            label(""), f"error {before:.2g}", f"error {(after := self._error(model)):.2g}", "of the output", after
        )
        return [*(told.get(name, row) for name, row in rows.items()), whole]

    def _see(self, name: str) -> Any:
        # Itself, without hooks: those of the old norm are its own.
        norm = copy.copy(self._new[name])
        size = norm.get_parameter("weight").numel()
        norm._parameters = {"weight": nn.Parameter(torch.ones(size)), "bias": nn.Parameter(torch.zeros(size))}
        last = read_norm(name, norm).axes == "n * c"
        norm.to(self._new[name].get_parameter("weight")).eval()

        def hook(old: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            z = norm.forward(args[0])
            channels = z.dim() - 1 if last else 1
            z, y = (part.double().movedim(channels, 0).flatten(1) for part in (z, y))
            new = torch.stack(
                [
                    torch.full_like(z[:, 0], z.shape[1]),
                    z.sum(1),
                    y.sum(1),
                    (z * z).sum(1),
                    (z * y).sum(1),
                    (y * y).sum(1),
                ]
            )
            self._sums[name] = self._sums.get(name, torch.zeros_like(new)) + new

        return hook

    @torch.no_grad()
    def _fit_one(self, norm: nn.Module, sums: Tensor) -> tuple[str, float]:
        n, z, y, zz, zy, yy = sums
        var, cov = zz / n - (z / n).square(), zy / n - z * y / n.square()
        gain = torch.where(var > 0, cov / var, 0.0)
        bias = y / n - gain * z / n
        weight, old = norm.get_parameter("weight"), norm.get_parameter("bias")

        def error(a: Tensor, b: Tensor) -> float:
            rest = yy - 2 * a * zy - 2 * b * y + a.square() * zz + 2 * a * b * z + n * b.square()
            return float((rest.clamp_min(0).sum() / yy.sum()).sqrt())

        before = error(weight.double(), old.double())
        weight.copy_(gain)
        old.copy_(bias)
        return f"error of the layer {before:.2g} before calibration", error(gain, bias)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad():
                found = [[*tensors_in(forward_batch(model, batch))] for batch in self._batches]
            return [part.clone() for parts in found for part in parts if part.is_floating_point()]
        finally:
            for module, mode in modes:
                module.training = mode

    def _error(self, model: nn.Module) -> float:
        pairs = list(zip(self._outputs(model), self._wanted, strict=True))
        rest, whole = (
            sum(float(part.double().square().sum()) for part in parts)
            for parts in ([a - b for a, b in pairs], [b for _, b in pairs])
        )
        return (rest / whole) ** 0.5 if whole else 0.0


def _can_be_fitted(norm: nn.Module) -> bool:
    own = [norm._parameters.get(key) for key in ("weight", "bias")]
    simple = getattr(norm, "activation", None) is None and norm._buffers.get("running_mean") is None
    return simple and all(p is not None and p.dim() == 1 for p in own)
