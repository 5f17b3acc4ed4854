"""The figures of a study of classifiers: training curves as the paper's, and the sweep of learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from normkit.lab.claims.drawing import band, name_ends, picture
from normkit.lab.claims.numbers import by_step
from normkit.lab.papers.classification import GIVEN, TUNED
from normkit.lab.papers.learning import folder_name
from normkit.lab.report.canvas import FULL, log, panels, plain
from normkit.lab.report.palette import styles
from normkit.lab.train import OK


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws, for each part, training loss and validation accuracy along training, and accuracy against the rate."""
    written = []
    for label, part in result["parts"].items():
        for kind in (TUNED, GIVEN):
            if kind in part["sets"]:
                rows = [row for row in part["sets"][kind] if not row["control"]]
                end = "" if kind == TUNED or TUNED not in part["sets"] else "-given-rate"
                written += picture(folder, f"{folder_name(label)}{end}-curves", partial(curves, rows))
        rows = next(iter(part["sets"].values()))
        if any(row["sweep"] for row in rows):
            written += picture(folder, f"{folder_name(label)}-rates", partial(rates, rows))
    return written


def curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss and validation Top-1: means over seeds, bands from the lowest seed to the highest."""
    figure, axes = panels(2, FULL, 2.6)
    looks = styles([row["name"] for row in rows], rows[0]["name"])
    ends: list[list[tuple[float, str, str]]] = [[], []]
    for row, look in zip(rows, looks, strict=True):
        for place, (axis, key, times) in enumerate(zip(axes, ("train_loss", "val_score"), (1, 100), strict=True)):
            runs = [
                [{"step": epoch, "value": times * value} for epoch, value in enumerate(run["curve"][key], 1)]
                for run in row["runs"]
            ]
            steps, middle, low, high = by_step(runs, lambda point: point["value"])
            if steps:
                band(axis, steps, middle, low, high, color=look.light, linestyle=look.line)
                ends[place].append((middle[-1], row["name"], look.light))
    for axis, words in zip(axes, ("training loss", "validation Top-1 in %"), strict=True):
        axis.set(xlabel="epoch", ylabel=words)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.margins(x=0.01)
    log(axes[0])
    # Positions of names need final limits.
    figure.canvas.draw()
    for axis, found in zip(axes, ends, strict=True):
        name_ends(axis, found)
    return figure


def rates(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation Top-1 at the end against the learning rate; a cross at the bottom where training diverged."""
    rows = [row for row in rows if row["sweep"]]
    figure, (axis,) = panels(1, FULL * 0.62, 2.6)
    looks = styles([row["name"] for row in rows], rows[0]["name"])
    tried = sorted({run["rate"] for row in rows for run in row["sweep"]})
    ends = []
    for row, look in zip(rows, looks, strict=True):
        good = [(run["rate"], 100 * run["score"]) for run in row["sweep"] if run["status"] == OK]
        axis.plot(
            *zip(*good, strict=True), look.marker, linestyle=look.line, color=look.light, markersize=4
        ) if good else None
        for run in row["sweep"]:
            if run["status"] != OK:
                axis.plot([run["rate"]], [0.03], "x", color=look.light, transform=axis.get_xaxis_transform())
        if good:
            ends.append((good[-1][1], row["name"], look.light))
    axis.set_xscale("log")
    axis.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="learning rate", ylabel=plain("validation Top-1 in %"))
    figure.canvas.draw()
    name_ends(axis, ends)
    return figure
