"""Curves along training: the mean over seeds and the range they span."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normkit.lab.report.comparison import Run, finite


@dataclass(frozen=True)
class Curve:
    """The mean, lowest and highest of the complete runs at each epoch, and apart from them the diverged runs."""

    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    lost: list[tuple[int, list[int], list[float]]]


def curve(runs: Sequence[Run], field: str) -> Curve:
    """Gathers one logged value ("val_score" or "train_loss") of the runs of a recipe.

    An epoch counts only where every complete run has the value, so that the mean never jumps because a run left it.
    """
    whole = [dict(zip(run.epochs, getattr(run, field), strict=True)) for run in runs if run.status == "ok"]
    epochs, means, lows, highs = [], [], [], []
    for epoch in sorted(set.intersection(*(set(values) for values in whole)) if whole else ()):
        values = [run[epoch] for run in whole if run[epoch] is not None]
        if len(values) == len(whole):
            epochs.append(epoch)
            means.append(sum(values) / len(values))
            lows.append(min(values))
            highs.append(max(values))
    lost = []
    for run in runs:
        if run.status != "ok":
            pairs = [(e, v) for e, v in zip(run.epochs, getattr(run, field), strict=True) if v is not None]
            lost.append((run.seed, [epoch for epoch, _ in pairs], [value for _, value in pairs]))
    return Curve(epochs, means, lows, highs, lost)


def sweep(entries: Sequence[dict[str, Any]]) -> list[tuple[float, float | None]]:
    """Each rate tried and the mean of its validation scores; None where no run came through."""
    scores: dict[float, list[float]] = {}
    for entry in entries:
        known = scores.setdefault(float(entry["rate"]), [])
        score = finite(entry.get("val_score"))
        if entry["status"] == "ok" and score is not None:
            known.append(score)
    return [(rate, sum(known) / len(known) if known else None) for rate, known in sorted(scores.items())]
