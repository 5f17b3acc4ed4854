"""The figures of a study of classifiers: training curves as the paper's, and the sweep of learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from normkit.lab.experiment import Drawing
from normkit.lab.experiments.classification import GIVEN, TUNED
from normkit.lab.report import drawing
from normkit.lab.stats import mean, scored, where
from normkit.lab.train.learning import folder_name
from normkit.lab.train.trainer import OK

CROWD = 1 + len(drawing.HUES)  # with more methods than that, lines share colours and hide one another
# Of a panel: what of a curve it shows, by what that is multiplied, and what it is called.
PANELS = (("train_loss", 1, "training loss"), ("val_score", 100, "validation Top-1 in %"))
CAPTIONS = {
    "curves": f"training loss, on a log scale, and validation Top-1 along training; {drawing.SEEDS}. Compare the distance "
    "between lines with the width of their bands.",
    "ends": "training loss and validation Top-1 of the last epoch; a dot is a seed, a bar the mean over seeds, and the vertical "
    "line that of the first row. Look for methods whose dots are all on one side of the line; a seed that diverged has no dot.",
    "rates": "validation Top-1 at the end of training against the learning rate, a point per run of the first "
    "seed; a cross at the bottom is a run that diverged. The highest point of a line is the rate chosen for "
    "that method; where it is the last on either side, a better rate may lie beyond.",
}


def figures(result: Mapping[str, Any]) -> list[Drawing]:
    """Draws, for each part, training loss and validation accuracy along training or at its end, and accuracy by rate."""
    drawn = []
    for label, part in result["parts"].items():
        for kind in (TUNED, GIVEN):
            if kind in part["sets"]:
                rows = where(part["sets"][kind], control=False)
                end = "" if kind == TUNED or TUNED not in part["sets"] else "-given-rate"
                rate = "each method at its chosen rate" if kind == TUNED else f"all methods at rate {rows[0]['rate']:g}"
                form, draw = ("ends", _ends) if len(rows) > CROWD else ("curves", _curves)
                caption = f"{label}, {rate}: {CAPTIONS[form]}"
                drawn.append(Drawing(f"{folder_name(label)}{end}-{form}", partial(draw, rows), caption))
        rows = next(iter(part["sets"].values()))
        if any(row["sweep"] for row in rows):
            name = f"{folder_name(label)}-rates"
            drawn.append(Drawing(name, partial(_rates, rows), f"{label}: {CAPTIONS['rates']}"))
    return drawn


def curve(row: Mapping[str, Any], look: drawing.Style, key: str, times: float = 1.0) -> drawing.Curve:
    """The line of a row: a measure of its runs after each epoch."""
    lines = [[{"step": n, "x": x and times * x} for n, x in enumerate(run["curve"][key], 1)] for run in row["runs"]]
    return drawing.Curve(row["name"], look.light, lines, {"linestyle": look.line})


def _curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = drawing.panels(2, drawing.FULL, 2.6)
    looks = drawing.styles([row["name"] for row in rows], rows[0]["name"])
    found = []
    for axis, (key, times, words) in zip(axes, PANELS, strict=True):
        lines = [curve(row, look, key, times) for row, look in zip(rows, looks, strict=True)]
        found.append(drawing.along(axis, lines, lambda point: point["x"], "epoch"))
        axis.set_ylabel(words)
    drawing.log(axes[0])
    # Positions of names need final limits.
    figure.canvas.draw()
    for axis, names in zip(axes, found, strict=True):
        drawing.name_ends(axis, names)
    return figure


def _ends(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = drawing.panels(2, drawing.FULL, 0.6 + 0.17 * len(rows), sharey=True)
    for axis, (key, times, words) in zip(axes, PANELS, strict=True):
        for y, row in enumerate(rows):
            values = [times * run["curve"][key][-1] for run in row["runs"] if run["status"] == OK]
            drawing.dots(axis, y, values, drawing.COLOURS[0] if y else drawing.GREY)
            if values and not y:
                axis.axvline(mean(values) or 0.0, color=drawing.FAINT, linewidth=0.8)
        axis.set_xlabel(words)
        drawing.rows_of(axis, [drawing.plain(row["name"]) for row in rows])
    return figure


def _rates(rows: Sequence[Mapping[str, Any]]) -> Figure:
    rows = [row for row in rows if row["sweep"]]
    figure, (axis,) = drawing.panels(1, drawing.FULL * 0.62, 2.6)
    names = []
    for row, look in zip(rows, drawing.styles([row["name"] for row in rows], rows[0]["name"]), strict=True):
        good = {run["rate"]: [100 * run["score"]] for run in row["sweep"] if scored(run)}
        names += drawing.across(
            axis, row["name"], look.light, good, marker=look.marker, linestyle=look.line, markersize=4
        )
        lost = [run["rate"] for run in row["sweep"] if run["status"] != OK]
        axis.plot(lost, [0.03] * len(lost), "x", color=look.light, transform=axis.get_xaxis_transform())
    tried = sorted({run["rate"] for row in rows for run in row["sweep"]})
    ticks = tried[:1]
    for rate in tried:
        if rate > ticks[-1] * (tried[-1] / tried[0]) ** 0.12:  # as much room as a number needs
            ticks.append(rate)
    drawing.marked(axis, ticks)
    axis.set(xlabel="learning rate", ylabel=drawing.plain("validation Top-1 in %"))
    figure.canvas.draw()
    drawing.name_ends(axis, names)
    return figure
