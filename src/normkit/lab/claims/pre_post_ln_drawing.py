"""Curves and gradients of encoders whose norms stand before or after each branch."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

from normkit.lab.claims.drawing import COLOURS, SEEDS, band, name_ends, picture
from normkit.lab.claims.numbers import by_step, choose, known, mean
from normkit.lab.experiment import Drawing
from normkit.lab.report.canvas import DOTTED, FAINT, FULL, log, panels
from normkit.residual import Placement

PLACEMENTS: dict[Placement, str] = {"post": "Post-LN", "pre": "Pre-LN"}
OPTIMIZERS = {"adam 1e-3": "Adam 1e-3", "adam 3e-4": "Adam 3e-4", "sgd 0.1": "SGD 0.1"}
NORMS = {"ln": "LayerNorm", "rms": "RMSNorm", "scale": "ScaleNorm", "scale+fix": "ScaleNorm and FixNorm"}
HUES: dict[Placement, str] = {"post": COLOURS[1], "pre": COLOURS[0]}


def draw(result: dict[str, Any], folder: Path) -> list[Drawing]:
    """Draws the figures of the claim.

    Args:
        result: what its ``run`` returned.
        folder: where to.
    """
    return [
        picture(
            folder,
            "gradients",
            lambda: gradients(result),
            "Gradient norms before training, with the norm after each branch (Post-LN) or before it (Pre-LN): of the last layer "
            f"of encoders of several depths (left and middle; {SEEDS}), and of every layer of each encoder for the loss at one "
            "token (right; the thicker a line, the deeper the encoder). Compare the slopes on the left with those of the "
            "theory, the dotted lines.",
        ),
        picture(
            folder,
            "norms",
            lambda: norms(result),
            "Loss on sort at the end of training with Adam at 1e-3 and no warm-up, for each norm, placed after the branches or "
            "before them; a dot is a seed and a bar the mean over seeds. The dotted line is the loss of a guess that knows only "
            "how frequent each token is: a dot near it has learned nothing more.",
        ),
        *(
            picture(
                folder,
                f"loss_{task}",
                partial(losses, result, task),
                f"Training loss on {task}, a panel for each optimizer and learning rate, with the norm after each branch "
                f"(Post-LN) or before it (Pre-LN); {SEEDS}. The dotted line is the loss of a guess that knows only how frequent "
                "each token is: look at whether, and how soon, each line falls below it.",
            )
            for task in result["guess"]
        ),
    ]


def losses(result: dict[str, Any], task: str) -> Figure:
    """The training loss on one task, a panel an optimizer."""
    used = [optimizer for optimizer in OPTIMIZERS if choose(result["runs"], task=task, norm="ln", optimizer=optimizer)]
    figure, axes = panels(len(used), FULL if len(used) > 1 else 4.2, 2.7, sharey=True)
    for axis, optimizer in zip(axes, used, strict=True):
        ends = []
        for placement, name in PLACEMENTS.items():
            for warmup in (False, True):
                which = {"task": task, "norm": "ln", "optimizer": optimizer, "placement": placement, "warmup": warmup}
                rows = [run["rows"] for run in choose(result["runs"], **which)]
                steps, middle, low, high = by_step(rows, lambda row: row["loss"])
                if steps:
                    band(axis, steps, middle, low, high, color=HUES[placement], linestyle="-" if warmup else "--")
                    ends.append((middle[-1], f"{name}, {'warm-up' if warmup else 'no warm-up'}", HUES[placement]))
        axis.axhline(result["guess"][task], color=FAINT, linestyle=DOTTED, linewidth=0.9)
        axis.set_title(OPTIMIZERS[optimizer], loc="left")
        axis.set_xlabel("step")
        axis.margins(x=0)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if axis is axes[-1]:
            name_ends(axis, ends)
    axes[0].set_ylabel(f"training loss on {task}, nats a token")
    styles = {"no warm-up": "--", "warm-up over 10 % of the steps": "-", "frequencies alone": DOTTED}
    handles = [Line2D([], [], color=FAINT, linestyle=style) for style in styles.values()]
    columns = 3 if len(used) > 1 else 2  # what fits the figure's width
    figure.legend(handles, list(styles), loc="outside upper left", ncols=columns, columnspacing=1.2)
    return figure


def gradients(result: dict[str, Any]) -> Figure:
    """Gradients before training: the last layer's against the depth, and each layer's of the deepest encoders."""
    figure, axes = panels(3, FULL, 2.6)
    depths = sorted({start["depth"] for start in result["starts"]})
    titles = (
        "last layer, loss at one token",
        "last layer, mean loss of a batch",
        f"every layer, depths {_list(depths)}",
    )
    for axis, what, title in zip(axes, ("token", "batch", "token"), titles, strict=True):
        ends = []
        for placement, name in PLACEMENTS.items():
            starts = choose(result["starts"], placement=placement)
            lasts = [known(s[what][-1] for s in starts if s["depth"] == depth) for depth in depths]
            middle = [mean(values) or 0.0 for values in lasts]
            ends.append((middle[-1], name, HUES[placement]))
            if axis is axes[2]:
                for depth in depths:
                    each = np.mean([s[what] for s in starts if s["depth"] == depth], axis=0)
                    axis.plot(range(1, depth + 1), each, color=HUES[placement], linewidth=0.4 + 0.25 * np.log2(depth))
                continue
            style: dict[str, Any] = {"color": HUES[placement], "marker": "o", "markersize": 3.5}
            band(axis, depths, middle, [min(values) for values in lasts], [max(values) for values in lasts], **style)
            if what == "token":
                theory = [middle[0] * (depth / depths[0]) ** (-0.5 if placement == "pre" else 0.0) for depth in depths]
                axis.plot(depths, theory, color=HUES[placement], linestyle=DOTTED, linewidth=0.9)
        axis.set_title(title, loc="left")
        axis.set_xlabel("layer" if axis is axes[2] else "depth of the encoder")
        if axis is not axes[2]:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(FixedLocator(depths))
            axis.set_xticks(depths, [str(depth) for depth in depths])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", which="minor", bottom=False)
        log(axis)
        name_ends(axis, ends)
    axes[0].set_ylabel("gradient norm of the second\nfeed-forward weight, before training")
    handles = [Line2D([], [], color=FAINT, linestyle=DOTTED)]
    figure.legend(
        handles, ["theory for one token: constant with Post-LN, 1 / √depth with Pre-LN"], loc="outside upper left"
    )
    return figure


def _list(depths: list[int]) -> str:
    return f"{', '.join(map(str, depths[:-1]))} and {depths[-1]}"


def norms(result: dict[str, Any]) -> Figure:
    """The loss at the end with each norm, on sort by Adam 1e-3 without warm-up; a dot is a seed."""
    figure, (axis,) = panels(1, 4.2, 1.9)
    for y, norm in enumerate(NORMS):
        for placement in PLACEMENTS:
            which = {"task": "sort", "optimizer": "adam 1e-3", "warmup": False, "norm": norm, "placement": placement}
            values = known(run["loss"] for run in choose(result["runs"], **which))
            at = [y + (0.14 if placement == "pre" else -0.14)] * len(values)
            axis.plot(values, at, "o", color=HUES[placement], markersize=3.5, alpha=0.6, markeredgewidth=0)
            if (middle := mean(values)) is not None:
                axis.plot([middle], at[:1], "|", color=HUES[placement], markersize=9, markeredgewidth=1.6)
    axis.axvline(result["guess"]["sort"], color=FAINT, linestyle=DOTTED, linewidth=0.9)
    axis.set_yticks(range(len(NORMS)), list(NORMS.values()))
    axis.set_ylim(len(NORMS) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("loss on sort at the end, nats a token")
    handles = [Line2D([], [], color=HUES[p], marker="o", markersize=3.5, linestyle="") for p in PLACEMENTS]
    handles.append(Line2D([], [], color=FAINT, linestyle=DOTTED))
    figure.legend(
        handles, ["after the branch", "before the branch", "frequencies alone"], loc="outside upper left", ncols=3
    )
    return figure
