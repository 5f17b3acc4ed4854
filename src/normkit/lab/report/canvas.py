"""What the figures share: the look of a paper, panels, scales and names."""

import math
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLUMN = 3.4  # inches: one column of a two-column page
FULL = 7.0
DOTTED: Any = (0, (1, 1.2))
NAME = 24  # letters per line of a name
INK, FAINT, GRID = "#222222", "#8a8a8a", "#e3e3e3"
LOOK: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it, so that every machine draws the same
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "svg.hashsalt": "normkit",
    "figure.dpi": 100,
}


def panels(count: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, **options)
    return figure, list(axes[0])


def log(*axes: Axes, limit: float | None = None) -> None:
    """One log scale for panels that share it, with plain numbers where the range is short; beyond `limit` is cut off."""
    lines = [line for axis in axes for line in axis.get_lines()]
    drawn = [float(y) for line in lines for y in np.asarray(line.get_ydata(), float) if 0 < y <= (limit or math.inf)]
    if not drawn:
        return
    low, high = min(drawn), max(drawn)
    room = max(high / low, 1.2) ** 0.06
    steps = (1, 2, 3, 5) if high / low < 12 else (1, 2, 5) if high / low < 300 else (1,)
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
        if high / low < 1e4 and low > 1e-4 and high < 1e5:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(low / room, high * room)


def plain(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def folded(name: str) -> str:
    """A recipe's name as a label of a figure, in lines that leave room for what is drawn."""
    return plain("\n".join(wrap(name, NAME)))
