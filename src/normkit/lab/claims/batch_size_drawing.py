"""Accuracy against the size of training batches."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from normkit.lab.claims.drawing import COLOURS, GREY, SEEDS, SHAPES, band, name_ends, picture
from normkit.lab.claims.numbers import choose, known, mean
from normkit.lab.experiment import Drawing
from normkit.lab.report.canvas import FULL, panels

METHODS = {
    "bn": "BatchNorm",
    "gn": "GroupNorm",
    "ln": "LayerNorm",
    "gn+ws": "GroupNorm + WS",
    "bcn+ws": "BatchChannelNorm + WS",
    "brn": "BatchRenorm",
    "ghost": "GhostBatchNorm",
}
WAYS = {"running": "running statistics", "precise": "precise statistics", "batch": "test batch's statistics"}
HUES = dict(zip(METHODS, (GREY, *COLOURS), strict=True))


def draw(result: dict[str, Any], folder: Path) -> list[Drawing]:
    """Draws the figure of the claim.

    Args:
        result: what its ``run`` returned.
        folder: where to.
    """
    return [
        picture(
            folder,
            "accuracy",
            lambda: accuracies(result),
            "Test accuracy against the number of images in a training batch: every norm on the left, and on the right batch "
            "normalization evaluated with its running statistics, with statistics estimated anew from training images (precise) "
            f"and with those of the test batch; {SEEDS}. Look at how far each line falls towards a batch of one image.",
        )
    ]


def accuracies(result: dict[str, Any]) -> Figure:
    """Test accuracy of every method, and of batch normalization by what it normalizes with."""
    figure, axes = panels(2, FULL, 3.0, sharey=True)
    ends = []
    for (method, name), shape in zip(METHODS.items(), (*SHAPES, "X"), strict=True):
        value = line(axes[0], result, method, "running", {"color": HUES[method], "marker": shape})
        ends += [] if value is None else [(value, name, HUES[method])]
    ways = []
    for (way, name), colour, shape in zip(WAYS.items(), (GREY, COLOURS[0], COLOURS[1]), SHAPES, strict=False):
        value = line(axes[1], result, "bn", way, {"color": colour, "marker": shape})
        ways += [] if value is None else [(value, name, colour)]
    sizes = result["batches"]
    for axis, title in zip(axes, ("all norms", "BatchNorm, by what evaluation normalizes with"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", which="minor", bottom=False)
        axis.set_xlabel("images in a training batch")
        axis.set_title(title, loc="left")
    axes[0].set_ylabel("test accuracy, %")
    name_ends(axes[0], ends)
    name_ends(axes[1], ways)
    return figure


def line(axis: Axes, result: dict[str, Any], method: str, way: str, style: dict[str, Any]) -> float | None:
    """Means over seeds in a band from the lowest to the highest; gives the last mean."""
    found = []
    for batch in result["batches"]:
        values = known(run["accuracy"].get(way) for run in choose(result["runs"], method=method, batch=batch))
        if values:
            found.append((batch, mean(values) or 0.0, min(values), max(values)))
    if not found:
        return None
    sizes, middle, low, high = zip(*found, strict=True)
    scaled = ([100 * value for value in values] for values in (middle, low, high))
    band(axis, sizes, *scaled, markersize=3.5, linewidth=1.2, **style)
    return 100 * middle[-1]
