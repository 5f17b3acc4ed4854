"""Accuracies by what is normalized with, alpha curves, and ranges of normalized values."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normkit.lab.claims.drawing import COLOURS, GREY, SEEDS, band, name_ends, picture
from normkit.lab.claims.numbers import choose, known, mean
from normkit.lab.experiment import Drawing
from normkit.lab.report.canvas import DOTTED, FAINT, FULL, INK, log, panels

METHODS = {"bn": "BatchNorm", "brn": "BatchRenorm"}
ORDERS = {"shuffled": "Shuffled", "sorted": "Two classes a batch"}
WAYS = {
    "running": "running statistics",
    "precise": "precise statistics",
    "weighed": "example weighing",
    "batch": "test batch, shuffled",
    "sorted": "test batch, two classes",
}
RANGES = {
    "bound": "sqrt(n - 1)",
    "train": "training",
    "train strong": "training, strong",
    "eval": "evaluation",
    "eval strong": "evaluation, strong",
}
HUES = {"bn": GREY, "brn": COLOURS[0]}
RESPONSES = {
    "batch": ("batch", GREY),
    "running": ("running", COLOURS[1]),
    "weighed": ("weighing", COLOURS[2]),
    "renorm": ("renorm", COLOURS[0]),
}


def draw(result: dict[str, Any], folder: Path) -> list[Drawing]:
    """Draws the figures of the claim.

    Args:
        result: what its ``run`` returned.
        folder: where to.
    """
    sizes = " or ".join(map(str, result["batches"]))
    return [
        picture(
            folder,
            "accuracy",
            lambda: accuracies(result),
            "Test accuracy by the statistics that evaluation normalizes with; a dot is a seed and a bar the mean over seeds. "
            f"Each panel is a way to put together training batches of {sizes} images; where its rows lie apart, the choice of "
            "statistics matters.",
        ),
        picture(
            folder,
            "alpha",
            lambda: alphas(result),
            "Test accuracy of batch normalization that mixes a part α of the test example's own statistics into the running "
            f"ones, by how training batches were put together; {SEEDS}. Look for a maximum to the right of α = 0, where running "
            "statistics stand alone; marks at the bottom are the α chosen on held-out images, one a seed.",
        ),
        picture(
            folder,
            "ranges",
            lambda: ranges(result),
            "On the left, what one value of eight becomes as it grows, normalized by its batch, by running statistics, by "
            "running statistics with a tenth of its own (weighing) and by batch renormalization (renorm). On the right, the "
            "largest normalized value in each layer over test images and seeds, as triangles where one image of each batch is "
            "ten times as strong; √(n − 1) is the most that n values can reach by their own statistics, so only evaluation can "
            "lie above it.",
        ),
    ]


def accuracies(result: dict[str, Any]) -> Figure:
    """Test accuracy by what is normalized with; a dot is a seed, a bar their mean."""
    places = [(order, batch) for order in ORDERS for batch in result["batches"]]
    figure, axes = panels(len(places), FULL, 2.3, sharey=True, sharex=True)
    for axis, (order, batch) in zip(axes, places, strict=True):
        for y, way in enumerate(WAYS):
            for method, hue in HUES.items():
                runs = choose(result["runs"], method=method, order=order, batch=batch)
                values = [100 * value for value in known(run["accuracy"].get(way) for run in runs)]
                at = y + (0.15 if method == "brn" else -0.15)
                axis.plot(values, [at] * len(values), "o", color=hue, markersize=3, alpha=0.5, markeredgewidth=0)
                if (middle := mean(values)) is not None:
                    axis.plot([middle], [at], "|", color=hue, markersize=9, markeredgewidth=1.8)
        axis.set_title(f"{ORDERS[order]}, {batch}", loc="left")
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("test accuracy, %")
    axes[0].set_yticks(range(len(WAYS)), list(WAYS.values()))
    axes[0].set_ylim(len(WAYS) - 0.5, -0.5)
    handles = [Line2D([], [], color=HUES[m], marker="|", markersize=9, markeredgewidth=1.8, linestyle="") for m in HUES]
    figure.legend(handles, [METHODS[m] for m in METHODS], loc="outside upper left", ncols=2)
    return figure


def alphas(result: dict[str, Any]) -> Figure:
    """Test accuracy against the weight of the example's own statistics."""
    figure, axes = panels(len(ORDERS), FULL, 2.5, sharey=True)
    for axis, (order, words) in zip(axes, ORDERS.items(), strict=True):
        ends = []
        for batch, hue in zip(result["batches"], (COLOURS[1], COLOURS[0]), strict=False):
            runs = [run for run in choose(result["runs"], method="bn", order=order, batch=batch) if run["alphas"]]
            if not runs:
                continue
            places = [alpha for alpha, _ in runs[0]["alphas"]["test"]]
            columns = list(zip(*([100 * score for _, score in run["alphas"]["test"]] for run in runs), strict=True))
            middle = [sum(column) / len(column) for column in columns]
            style: dict[str, Any] = {"color": hue, "marker": "o", "markersize": 3}
            band(axis, places, middle, list(map(min, columns)), list(map(max, columns)), **style)
            ends.append((middle[-1], f"batch {batch}", hue))
            for run in runs:
                axis.axvline(run["alphas"]["chosen"], ymax=0.04, color=hue, linewidth=1.4)
        axis.set_xscale("symlog", linthresh=1e-3, linscale=0.5)
        ticks = (0, 1e-3, 1e-2, 1e-1, 1)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        # Its own margin would be as wide below 0 as three decades.
        axis.set_xlim(-2e-4, 1.2)
        axis.set_title(f"{words} in training", loc="left")
        axis.set_xlabel("α, weight of the example's own statistics")
        name_ends(axis, ends)
    axes[0].set_ylabel("test accuracy, %")
    figure.legend(
        [Line2D([], [], color=FAINT, linewidth=1.4, marker="|", linestyle="", markersize=7)],
        ["chosen on held-out images, a mark a seed"],
        loc="outside upper left",
    )
    return figure


def ranges(result: dict[str, Any]) -> Figure:
    """What one value of eight becomes as it grows, and the largest normalized values met in each layer."""
    figure, axes = panels(1 + len(result["batches"]), FULL, 2.7)
    found, ends = result["responses"], []
    for key, (name, hue) in RESPONSES.items():
        axes[0].plot(found["input"], found[key], color=hue)
        ends.append((found[key][-1], name, hue))
    bound = math.sqrt(7)
    axes[0].axhline(bound, color=INK, linestyle=DOTTED, linewidth=0.9)
    axes[0].set(xscale="log", yscale="log", xlabel="one value of eight", ylabel="what it becomes")
    axes[0].set_title("a value that grows", loc="left")
    styles = {
        "train": (GREY, "o"),
        "train strong": (GREY, "^"),
        "eval": (COLOURS[1], "o"),
        "eval strong": (COLOURS[1], "^"),
    }
    for axis, batch in zip(axes[1:], result["batches"], strict=True):
        runs = [r for r in choose(result["runs"], method="bn", order="shuffled", batch=batch) if r.get("ranges")]
        if not runs:
            continue
        layers = range(1, len(runs[0]["ranges"]) + 1)
        for key, (hue, shape) in styles.items():
            largest = [max(run["ranges"][k - 1][key] for run in runs) for k in layers]
            axis.plot(layers, largest, color=hue, marker=shape, markersize=3.5, linestyle="" if shape == "^" else "-")
        axis.plot(
            layers, [runs[0]["ranges"][k - 1]["bound"] for k in layers], color=INK, linestyle=DOTTED, linewidth=0.9
        )
        log(axis)
        axis.set_title(f"largest in each layer, batch {batch}", loc="left")
        axis.set_xlabel("norm")
        axis.set_xticks(layers)
    axes[0].set_xlim(found["input"][0], found["input"][-1])
    name_ends(axes[0], ends)
    handles = [
        *(Line2D([], [], color=hue, marker=shape, markersize=3.5, linestyle="") for hue, shape in styles.values()),
        Line2D([], [], color=INK, linestyle=DOTTED),
    ]
    labels = ["training", "training, one image ten times as strong", "evaluation", "evaluation, strong", "√(n − 1)"]
    figure.legend(handles, labels, loc="outside upper left", ncols=5, columnspacing=1.0)
    return figure
