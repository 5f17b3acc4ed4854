"""Pictures of discriminators and what their generators made."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from normkit.lab.claims.drawing import COLOURS, GREY, SEEDS, band, name_ends, picture
from normkit.lab.claims.numbers import by_step, choose
from normkit.lab.experiment import Drawing
from normkit.lab.models.gan import centres
from normkit.lab.report.canvas import DOTTED, FAINT, FULL, INK, panels

KINDS = {
    "none": "nothing",
    "clip": "clipping",
    "wn": "weight norm",
    "sn": "spectral norm",
    "hard": "reassignment",
}
HUES = dict(zip(KINDS, (GREY, COLOURS[4], COLOURS[3], COLOURS[0], COLOURS[1]), strict=True))
LOSSES = {"hinge": "Hinge loss", "wasserstein": "Wasserstein loss"}


def draw(result: dict[str, Any], folder: Path) -> list[Drawing]:
    """Draws the figures of the claim.

    Args:
        result: what its ``run`` returned.
        folder: where to.
    """
    return [
        picture(
            folder,
            "points",
            lambda: points(result),
            "Points made by the generators of the first seed (dots), the centres of the eight Gaussians that they learn "
            "(circles), and level lines of their discriminators. Columns say what is done to the discriminator's weights, where "
            "reassignment divides them by their largest singular value after each step; the number counts the Gaussians that "
            "were found, which have at least a fiftieth of the points within three standard deviations.",
        ),
        picture(
            folder,
            "lipschitz",
            lambda: lipschitz(result),
            "Bounds on how fast the discriminator D changes, along training: from above the product of its layers' largest "
            f"singular values (solid), from below the steepest gradient found (dotted); {SEEDS}. The horizontal line is 1: look "
            "at which solid lines stay there, and how far below each its dotted line runs.",
        ),
        picture(
            folder,
            "singular_values",
            lambda: singular_values(result),
            "All singular values of the discriminator's second layer under the hinge loss, the largest first, before training "
            "(light grey) and after it (in colour), a line for each seed. The horizontal line is 1; the faster a line falls, "
            "the fewer directions the layer still passes on.",
        ),
        picture(
            folder,
            "memory",
            lambda: memory(result),
            "Power iteration on the discriminator's second weight, before any normalization of it: the relative error of the "
            "largest singular value sigma after one iteration (left) and the number of iterations to an error of 0.001 (right), "
            "from vectors kept from step to step (solid) or from random ones (dashed), as means over seeds and losses. The gap "
            "between the solid and the dashed line of a colour is what keeping the vectors is worth.",
        ),
    ]


def points(result: dict[str, Any]) -> Figure:
    """What the first seed's generators made, over the level lines of their discriminators."""
    figure = Figure(figsize=(FULL, 3.15), layout="constrained")
    grid = figure.subplots(len(LOSSES), len(KINDS), sharex=True, sharey=True, squeeze=False)
    for row, (loss, title) in enumerate(LOSSES.items()):
        for axis, (kind, name) in zip(grid[row], KINDS.items(), strict=True):
            axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=(), yticks=())
            axis.grid(visible=False)
            for side in axis.spines.values():
                side.set_visible(True)
            if row == 0:
                axis.set_title(name, color=HUES[kind])
            runs = [run for run in choose(result["runs"], loss=loss, kind=kind) if "field" in run]
            if not runs:
                continue
            run = runs[0]
            if run["field"] is None:
                axis.text(0, 0, "diverged", ha="center", va="center", fontsize=7)
                continue
            field = np.array([[np.nan if value is None else value for value in line] for line in run["field"]])
            ticks = np.linspace(-3, 3, len(field))
            if np.isfinite(field).all() and np.ptp(field) > 0:
                axis.contour(ticks, ticks, field, levels=12, colors="#b9c4cf", linewidths=0.5, linestyles="solid")
            made = np.array(run["points"], dtype=float)
            axis.scatter(made[:, 0], made[:, 1], s=3, color=HUES[kind], alpha=0.35, linewidths=0)
            middle = centres().numpy()
            axis.scatter(middle[:, 0], middle[:, 1], s=30, facecolors="none", edgecolors=INK, linewidths=0.7)
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axis.text(0, 0, f"{run['modes']} of 8", ha="center", va="center", fontsize=7, bbox=ground)
        grid[row][0].set_ylabel(title)
    return figure


def lipschitz(result: dict[str, Any]) -> Figure:
    """The product of the layers' sigma, which bounds the Lipschitz constant, and the steepest gradient found."""
    figure, axes = panels(2, FULL, 2.8, sharey=True)
    for axis, (loss, title) in zip(axes, LOSSES.items(), strict=True):
        ends = []
        for kind, name in KINDS.items():
            rows = [run["rows"] for run in choose(result["runs"], loss=loss, kind=kind)]
            steps, middle, low, high = by_step(rows, lambda row: row["bound"])
            if not steps:
                continue
            band(axis, steps, middle, low, high, color=HUES[kind])
            steps, steepest, *_ = by_step(rows, lambda row: row["steepest"])
            axis.plot(steps, steepest, color=HUES[kind], linestyle=DOTTED, linewidth=1.1)
            ends.append((middle[-1], name, HUES[kind]))
        axis.axhline(1, color=INK, linewidth=0.6, zorder=1)
        axis.set_yscale("log")
        axis.set_title(title, loc="left")
        axis.set_xlabel("steps of the generator")
        axis.margins(x=0)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        name_ends(axis, ends)
    axes[0].set_ylabel("change of D per unit of distance")
    handles = [Line2D([], [], color=FAINT), Line2D([], [], color=FAINT, linestyle=DOTTED)]
    labels = ["product of the layers' largest singular values", "steepest gradient found"]
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def singular_values(result: dict[str, Any]) -> Figure:
    """All singular values of the second layer, before and after training."""
    figure, axes = panels(len(KINDS), FULL, 1.9, sharey=True)
    there = [run for run in result["runs"] if run["spectra"]]  # a run that diverged has none
    for axis, (kind, name) in zip(axes, KINDS.items(), strict=True):
        for run in choose(there, loss="hinge", kind=kind):
            for when, colour in (("first", FAINT), ("last", HUES[kind])):
                values = run["spectra"][when][1]
                axis.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.9)
        axis.axhline(1, color=INK, linewidth=0.6, zorder=1)
        axis.set_title(name, color=HUES[kind])
        axis.set_yscale("log")
        axis.set_xlabel("rank")
    low = min((value for run in there for value in run["spectra"]["last"][1][:-8]), default=0.01)
    axes[0].set_ylim(bottom=max(low, 1e-3))
    axes[0].set_ylabel("singular value, layer 2")
    for y, word, colour in ((0.16, "before training", FAINT), (0.06, "after", HUES["none"])):
        axes[0].text(0.05, y, word, color=colour, transform=axes[0].transAxes, fontsize=7)
    return figure


def memory(result: dict[str, Any]) -> Figure:
    """Error of sigma after one power iteration, and iterations to a thousandth, from kept and from random vectors."""
    figure, axes = panels(2, FULL, 2.5)
    ways = {"kept": "kept", "fresh": "random"}
    for axis, key, label in zip(
        axes,
        ("error", "iterations"),
        ("error of sigma after one iteration", "iterations to an error of 0.001"),
        strict=True,
    ):
        ends = []
        for kind in ("none", "sn"):
            rows = [run["rows"] for run in choose(result["runs"], kind=kind)]
            for way, word in ways.items():
                steps, middle, *_ = by_step(rows, lambda row, way=way, key=key: row[way][1][key])
                if steps:
                    style = "-" if way == "kept" else "--"
                    # In single precision an error below the unit of rounding is none.
                    axis.plot(steps, [max(value, 1e-7) for value in middle], color=HUES[kind], linestyle=style)
                    ends.append((max(middle[-1], 1e-7), f"{KINDS[kind]}, {word}", HUES[kind]))
        axis.set_yscale("log")
        axis.set_title(label, loc="left")
        axis.set_xlabel("steps of the generator")
        axis.margins(x=0)
        name_ends(axis, ends)
    return figure
