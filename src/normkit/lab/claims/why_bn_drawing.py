"""Loss, covariate shift and smoothness along training, and losses at many rates."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from normkit.lab.claims.drawing import COLOURS, GREY, SEEDS, band, name_ends, picture
from normkit.lab.claims.numbers import by_step, choose, known, mean
from normkit.lab.experiment import Drawing
from normkit.lab.report.canvas import FAINT, FULL, log, panels

METHODS = {"none": "no norm", "bn": "BatchNorm", "noisy": "BatchNorm + noise"}
HUES = {"none": GREY, "bn": COLOURS[0], "noisy": COLOURS[1]}


def draw(result: dict[str, Any], folder: Path) -> list[Drawing]:
    """Draws the figures of the claim.

    Args:
        result: what its ``run`` returned.
        folder: where to.
    """
    return [
        picture(
            folder,
            "shift",
            lambda: shift(result),
            "Training loss (left) beside two measures of covariate shift: the cosine between a layer's gradient before and "
            "after the layers in front of it take their step, 1 where that changes nothing (middle), and how far one step moves "
            f"the channel means of a layer's input, in standard deviations (right); {SEEDS}. More shift is lower in the middle "
            "and higher on the right: compare its order with that of the losses.",
        ),
        picture(
            folder,
            "smoothness",
            lambda: smoothness(result),
            "Along the gradient, at steps of training: the range of the loss, from the mean over seeds of its lowest value to "
            "that of its highest (left), the largest change of the gradient (middle) and the largest change per unit of "
            f"distance (right); in the last two, {SEEDS}. Narrower on the left and lower in the others is smoother.",
        ),
        picture(
            folder,
            "rates",
            lambda: rates(result),
            f"Training loss after {result['short']} steps at each learning rate; {SEEDS}, and lines that leave the top go beyond "
            "4. A cross is a rate at which the loss of a seed was no number; look for the largest rate at which each line is "
            "still low.",
        ),
    ]


def shift(result: dict[str, Any]) -> Figure:
    """The training loss, and covariate shift in two definitions."""
    figure, axes = panels(3, FULL, 2.4)
    titles = ("training loss", "cosine of a layer's gradients", "movement of means, in deviations")
    for axis, key, title in zip(axes, ("loss", "turn", "mean"), titles, strict=True):
        curves(axis, result, key, scaled=axis is axes[2], last=axis is axes[2])
        axis.set_title(title, loc="left")
    axes[1].set_ylim(top=1.02)
    return figure


def smoothness(result: dict[str, Any]) -> Figure:
    """Range of the loss along the gradient, change of the gradient, and its ratio to the distance."""
    figure, axes = panels(3, FULL, 2.4)
    titles = ("loss along the gradient", "largest change of the gradient", "… per unit of distance")
    for method in METHODS:
        rows = [run["rows"] for run in choose(result["runs"], method=method, measured=True)]
        steps, low, *_ = by_step(rows, lambda row: row["low"])
        _, high, *_ = by_step(rows, lambda row: row["high"])
        axes[0].fill_between(steps, low, high, color=HUES[method], alpha=0.2, linewidth=0)
        for edge in (low, high):
            axes[0].plot(steps, edge, color=HUES[method], linewidth=1)
    for axis, key in zip(axes[1:], ("predictive", "beta"), strict=True):
        curves(axis, result, key, scaled=True, last=axis is axes[2])
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.margins(x=0)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def curves(axis: Axes, result: dict[str, Any], key: str, scaled: bool, last: bool) -> None:
    """A value along training for each method, means in a band over seeds."""
    ends = []
    for method, name in METHODS.items():
        rows = [run["rows"] for run in choose(result["runs"], method=method, measured=True)]
        steps, middle, low, high = by_step(rows, lambda row: row[key])
        if steps:
            band(axis, steps, middle, low, high, color=HUES[method])
            ends.append((middle[-1], name, HUES[method]))
    axis.set_xlabel("step")
    axis.margins(x=0)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if scaled:
        log(axis)
    if last:
        name_ends(axis, ends)


def rates(result: dict[str, Any]) -> Figure:
    """The loss after a few steps at every rate; a cross is a run whose loss was no number."""
    figure, (axis,) = panels(1, 3.6, 2.5)
    ends = []
    for method in ("none", "bn"):
        places, columns = [], []
        for rate in result["rates"]:
            runs = choose(result["runs"], method=method, measured=False, rate=rate)
            values = known(run["end"] for run in runs)
            if values:
                places.append(rate)
                columns.append(values)
            if len(values) < len(runs):
                y = 0.04 if method == "none" else 0.09
                axis.plot([rate], [y], "x", color=HUES[method], transform=axis.get_xaxis_transform(), markersize=4)
        if places:
            middle = [mean(values) or 0.0 for values in columns]
            style: dict[str, Any] = {"color": HUES[method], "marker": "o", "markersize": 3}
            band(axis, places, middle, list(map(min, columns)), list(map(max, columns)), **style)
            ends.append((min(middle[-1], 4.0), METHODS[method], HUES[method]))
    axis.set_xscale("log")
    axis.set_ylim(0, 4)
    axis.text(0.02, 0.04, "× loss was no number", transform=axis.transAxes, fontsize=6.5, color=FAINT)
    axis.set(xlabel="learning rate", ylabel=f"training loss after {result['short']} steps")
    name_ends(axis, ends)
    return figure
