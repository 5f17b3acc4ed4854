"""Gain and bias of new norms fitted to the mean and deviation of what the old ones gave, one norm after another."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.errors import SurgeryError
from normkit.surgery.changes import Change, label
from normkit.surgery.norms import read_norm
from normkit.surgery.recalibrate import forward_batch
from normkit.surgery.watch import modes_kept, tensors_in

_Sums = dict[str, list[Tensor]]  # of each call of a norm, by name in the order of first calls


class _Enough(Exception):
    """Ends a run when all that is wanted of it is seen."""


class Calibration:
    """Sums over batches, of a model as it was, by which new norms are fitted.

    For each channel, with z what a new norm gives without gain and bias, and y what the old one gave,

        gain = sign(cov(z, y)) std(y) / std(z),  bias = mean(y) - gain mean(z)

    so that mean and deviation stay. (The gain of least squares, cov(z, y) / var(z), is the smaller the less z is like y, and what
    one layer loses so the next ones lose again.) Norms are fitted in the order of their first calls, with z that of the changed
    model in which those before are fitted already; y and the covariance are those of the model as it was.
    """

    def __init__(
        self, model: nn.Module, pairs: Mapping[str, tuple[nn.Module, nn.Module]], batches: Iterable[Any]
    ) -> None:
        self._batches = list(batches)
        if not self._batches:
            raise SurgeryError("convert: calibrate has no batches; a generator is walked only once, give a fresh one")
        self._left = {name: reason for name, (_, new) in pairs.items() if (reason := _why_not(new))}
        self._new = {name: new for name, (_, new) in pairs.items() if name not in self._left}
        self._seen: _Sums = {}
        self._wanted = self._run(model, {name: pairs[name][0] for name in self._new}, self._seen)

    @property
    def written(self) -> list[Tensor]:
        """The parameters that fitting writes into."""
        return [p for norm in self._new.values() for p in norm.parameters(recurse=False)]

    def fit(self, model: nn.Module, rows: Mapping[str, Change]) -> list[Change]:
        """Fit the norms of a changed model; its rows with each layer's error, and one with the error of the whole."""
        before = self._error(model)
        left = {name: f"not calibrated: {reason}" for name, reason in self._left.items()}
        told = {name: row.with_note(left[name]) if name in left else row for name, row in rows.items()}
        for name, sums in self._seen.items():
            if name in rows:
                now: _Sums = {}
                calls, rest = divmod(len(sums), len(self._batches))
                self._run(model, {name: self._new[name]}, now, 0 if rest else calls)
                if name in now:  # a model may choose by what it reads
                    told[name] = self._fit_one(self._new[name], sums, now[name], rows[name])
        after = self._error(model)
        whole = Change(label(""), f"error {before:.2g}", f"error {after:.2g}", "of the output", after)
        return [*told.values(), whole]

    def _see(self, name: str, into: _Sums, enough: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        # Itself, without hooks: those of the old norm are its own.
        norm = copy.copy(self._new[name])
        size = norm.get_parameter("weight").numel()
        own = {"weight": nn.Parameter(torch.ones(size)), "bias": nn.Parameter(torch.zeros(size))}
        norm._parameters = {**norm._parameters, **own}
        last = read_norm(name, norm).axes == "n * c"
        norm.to(self._new[name].get_parameter("weight")).eval()

        def hook(old: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            z = norm.forward(args[0])
            channels = z.dim() - 1 if last else 1
            z, y = (part.double().movedim(channels, 0).flatten(1) for part in (z, y))
            parts = torch.ones_like(z), z, y, z * z, z * y, y * y
            into.setdefault(name, []).append(torch.stack([part.sum(1) for part in parts]))
            if enough and len(into[name]) % enough == 0:
                raise _Enough

        return hook

    @torch.no_grad()
    def _fit_one(self, norm: nn.Module, old: list[Tensor], new: list[Tensor], row: Change) -> Change:
        (n, z, y, zz, zy, yy), now = torch.stack(old).sum(0), torch.stack(new).sum(0)
        mean, var = now[1] / now[0], (now[3] / now[0] - (now[1] / now[0]).square()).clamp_min(0)
        spread, cov = (yy / n - (y / n).square()).clamp_min(0), zy / n - z * y / n.square()
        varies = var > 1e-10 * now[3] / now[0]  # else what varies is float32's rounding
        gain = torch.where(varies, cov.sign() * (spread / var).sqrt(), 0.0)
        bias = y / n - gain * mean
        own = norm.get_parameter("weight"), norm.get_parameter("bias")

        def error(a: Tensor, b: Tensor) -> float:
            rest = yy - 2 * a * zy - 2 * b * y + a.square() * zz + 2 * a * b * z + n * b.square()
            return float((rest.clamp_min(0).sum() / yy.sum()).sqrt())

        before = error(own[0].double(), own[1].double())
        for parameter, value in zip(own, (gain, bias), strict=True):
            parameter.copy_(value)
        return replace(row.with_note(f"error of the layer {before:.2g} before calibration"), error=error(gain, bias))

    def _run(
        self, model: nn.Module, norms: Mapping[str, nn.Module] | None = None, into: _Sums | None = None, enough: int = 0
    ) -> list[Tensor]:
        """The outputs in evaluation; sums of norms are taken on the way, and ``enough`` calls of one in a batch end its run."""
        seen = {} if into is None else into
        found = []
        with modes_kept(model), ExitStack() as stack:
            for name, norm in (norms or {}).items():
                stack.callback(norm.register_forward_hook(self._see(name, seen, enough)).remove)
            model.eval()
            for batch in self._batches:
                with suppress(_Enough), torch.no_grad():
                    found += [*tensors_in(forward_batch(model, batch))]
            return [part.clone() for part in found if part.is_floating_point()]

    def _error(self, model: nn.Module) -> float:
        pairs = list(zip(self._run(model), self._wanted, strict=True))
        rest, whole = (
            sum(float(part.double().square().sum()) for part in parts)
            for parts in ([a - b for a, b in pairs], [b for _, b in pairs])
        )
        return (rest / whole) ** 0.5 if whole else 0.0


def _why_not(norm: nn.Module) -> str:
    """Why a norm can't be fitted; empty where it can."""
    own = [norm._parameters.get(key) for key in ("weight", "bias")]
    if norm._buffers.get("running_mean") is not None:
        return "it normalizes by running statistics, which recalibrate estimates"
    if getattr(norm, "activation", None) is not None:
        return "an activation follows in it"
    return "" if all(p is not None and p.dim() == 1 for p in own) else "it has no gain and bias for each channel"
