"""Steps, accuracy by the scale of inputs, and training against test accuracy."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from normkit.lab.claims.drawing import COLOURS, GREY, SHAPES, name_ends, picture
from normkit.lab.claims.numbers import choose, known, mean
from normkit.lab.experiment import Drawing
from normkit.lab.report.canvas import FAINT, FULL, panels

METHODS = {
    "none": "no norm",
    "bn": "BatchNorm",
    "ln": "LayerNorm",
    "in": "InstanceNorm",
    "gn": "GroupNorm",
    "gn+ws": "GroupNorm + WS",
    "wn": "WeightNorm",
    "e": "equilibrated",
}
HUES = dict(zip(METHODS, (GREY, *COLOURS, "#8c6d5a"), strict=True))
MARKS = dict(zip(METHODS, (*SHAPES, "X", "p"), strict=True))


def draw(result: dict[str, Any], folder: Path) -> list[Drawing]:
    """Draws the figure of the claim.

    Args:
        result: what its ``run`` returned.
        folder: where to.
    """
    return [
        picture(
            folder,
            "benefits",
            lambda: benefits(result),
            "Steps of training to a loss of 1.8 nats, a mark a seed (left); test accuracy, mean over seeds, where inputs are "
            "multiplied by a number while the learning rate stays as it is, with guessing as the grey line (middle); and test "
            "accuracy against training minus test accuracy, a mark a seed with the colours and shapes of the left panel (right). "
            "Better is further left on the left, flat and high in the middle, and towards the upper left corner on the right.",
        )
    ]


def benefits(result: dict[str, Any]) -> Figure:
    """A panel for each benefit; the last has two, overfitting across and generalization up."""
    figure, axes = panels(3, FULL, 2.7, width_ratios=(1.0, 1.0, 1.0))
    ends = []
    for y, (method, name) in enumerate(METHODS.items()):
        runs = [run for run in result["runs"] if run["method"] == method]
        steps = known(run["steps"] for run in runs if run["scale"] == 1)
        style: dict[str, Any] = {"color": HUES[method], "marker": MARKS[method], "markersize": 3.5}
        axes[0].plot(steps, [y] * len(steps), linestyle="", alpha=0.6, **style)
        usual = choose(runs, scale=1.0)
        if missed := len(usual) - len(steps):
            # Below the marks of the seeds that got there, if any did.
            place, words = (y + 0.33, f"{missed} of {len(usual)} not reached") if steps else (y, "not reached")
            axes[0].text(0.03, place, words, fontsize=6.5, va="center", transform=axes[0].get_yaxis_transform())
        scales = sorted({run["scale"] for run in runs})
        curve = [
            100 * (mean(0.1 if run["test"] is None else run["test"] for run in choose(runs, scale=scale)) or 0.0)
            for scale in scales
        ]
        axes[1].plot(scales, curve, linewidth=1.1, **style)
        ends.append((curve[-1], name, HUES[method]))
        for run in usual:
            if run["test"] is not None:
                axes[2].plot([100 * (run["train"] - run["test"])], [100 * run["test"]], linestyle="", **style)
    axes[0].set_yticks(range(len(METHODS)), list(METHODS.values()))
    axes[0].set_ylim(len(METHODS) - 0.5, -0.5)
    axes[0].tick_params(axis="y", length=0)
    axes[0].set_xlim(left=0)
    axes[0].grid(axis="x", visible=True)
    axes[0].set(xlabel="steps to a training loss of 1.8")
    axes[1].set_xscale("log")
    axes[1].set_xticks((0.1, 1, 10), ("0.1", "1", "10"))
    axes[1].xaxis.set_minor_formatter(NullFormatter())
    axes[1].tick_params(axis="x", which="minor", bottom=False)
    axes[1].axhline(10, color=FAINT, linewidth=0.8)
    axes[1].set(xlabel="inputs multiplied by", ylabel="test accuracy, %")
    name_ends(axes[1], ends)
    axes[2].set(xlabel="training minus test, points", ylabel="test accuracy, %")
    for axis, title in zip(axes, ("convergence", "scale of inputs", "overfitting and accuracy"), strict=True):
        axis.set_title(title, loc="left")
    return figure
