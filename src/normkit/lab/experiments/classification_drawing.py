"""The figures of a study of classifiers: training curves as the paper's, and the sweep of learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from normkit.lab.experiment import Drawing
from normkit.lab.experiments.classification import GIVEN, TUNED
from normkit.lab.report.canvas import FAINT, FULL, log, panels, plain
from normkit.lab.report.drawing import COLOURS, GREY, SEEDS, band, name_ends
from normkit.lab.report.palette import HUES, styles
from normkit.lab.stats import by_step, mean, scored
from normkit.lab.train.learning import folder_name
from normkit.lab.train.trainer import OK

CROWD = 1 + len(HUES)  # with more methods than that, lines share colours and hide one another
# Of a panel: what of a curve it shows, by what that is multiplied, and what it is called.
PANELS = (("train_loss", 1, "training loss"), ("val_score", 100, "validation Top-1 in %"))
CAPTIONS = {
    "curves": f"training loss, on a log scale, and validation Top-1 along training; {SEEDS}. Compare the distance between lines "
    "with the width of their bands.",
    "ends": "training loss and validation Top-1 of the last epoch; a dot is a seed, a bar the mean over seeds, and the vertical "
    "line that of the first row. Look for methods whose dots are all on one side of the line; a seed that diverged has no dot.",
}


def figures(result: Mapping[str, Any]) -> list[Drawing]:
    """Draws, for each part, training loss and validation accuracy along training or at its end, and accuracy by rate."""
    drawn = []
    for label, part in result["parts"].items():
        for kind in (TUNED, GIVEN):
            if kind in part["sets"]:
                rows = [row for row in part["sets"][kind] if not row["control"]]
                end = "" if kind == TUNED or TUNED not in part["sets"] else "-given-rate"
                rate = "each method at its chosen rate" if kind == TUNED else f"all methods at rate {rows[0]['rate']:g}"
                form = "ends" if len(rows) > CROWD else "curves"
                drawn.append(
                    Drawing(
                        f"{folder_name(label)}{end}-{form}",
                        partial(ends if form == "ends" else curves, rows),
                        f"{label}, {rate}: {CAPTIONS[form]}",
                    )
                )
        rows = next(iter(part["sets"].values()))
        if any(row["sweep"] for row in rows):
            drawn.append(
                Drawing(
                    f"{folder_name(label)}-rates",
                    partial(rates, rows),
                    f"{label}: validation Top-1 at the end of training against the learning rate, one run of the first seed a "
                    "point; a cross at the bottom is a run that diverged. The highest point of a line is the rate chosen for "
                    "that method; where it is the last on either side, a better rate may lie beyond.",
                )
            )
    return drawn


def curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss and validation Top-1: means over seeds, bands from the lowest seed to the highest."""
    figure, axes = panels(2, FULL, 2.6)
    looks = styles([row["name"] for row in rows], rows[0]["name"])
    names: list[list[tuple[float, str, str]]] = [[], []]
    for row, look in zip(rows, looks, strict=True):
        for place, (axis, (key, times, _)) in enumerate(zip(axes, PANELS, strict=True)):
            runs = [
                [{"step": epoch, "value": times * value} for epoch, value in enumerate(run["curve"][key], 1)]
                for run in row["runs"]
            ]
            steps, middle, low, high = by_step(runs, lambda point: point["value"])
            if steps:
                band(axis, steps, middle, low, high, color=look.light, linestyle=look.line)
                names[place].append((middle[-1], row["name"], look.light))
    for axis, (_, _, words) in zip(axes, PANELS, strict=True):
        axis.set(xlabel="epoch", ylabel=words)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.margins(x=0.01)
    log(axes[0])
    # Positions of names need final limits.
    figure.canvas.draw()
    for axis, found in zip(axes, names, strict=True):
        name_ends(axis, found)
    return figure


def ends(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss and validation Top-1 of the last epoch: a dot is a seed that did not diverge, a bar their mean."""
    figure, axes = panels(2, FULL, 0.6 + 0.17 * len(rows), sharey=True)
    for axis, (key, times, words) in zip(axes, PANELS, strict=True):
        for y, row in enumerate(rows):
            values = [times * run["curve"][key][-1] for run in row["runs"] if run["status"] == OK]
            colour = COLOURS[0] if y else GREY
            axis.plot(values, [y] * len(values), "o", color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
            if (middle := mean(values)) is not None:
                axis.plot([middle], [y], "|", color=colour, markersize=9, markeredgewidth=1.8)
                if not y:
                    axis.axvline(middle, color=FAINT, linewidth=0.8)
        axis.set_xlabel(words)
        axis.grid(axis="x", visible=True)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(rows)), [plain(row["name"]) for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def rates(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation Top-1 at the end against the learning rate; a cross at the bottom where training diverged."""
    rows = [row for row in rows if row["sweep"]]
    figure, (axis,) = panels(1, FULL * 0.62, 2.6)
    looks = styles([row["name"] for row in rows], rows[0]["name"])
    tried = sorted({run["rate"] for row in rows for run in row["sweep"]})
    ends = []
    for row, look in zip(rows, looks, strict=True):
        good = [(run["rate"], 100 * run["score"]) for run in row["sweep"] if scored(run)]
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
