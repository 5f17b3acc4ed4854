"""What figures over seeds are made of: lines in bands along training or across a setting, and dots with a bar at their mean."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from normkit.lab.report.drawing import band
from normkit.lab.stats import Row, by_step, known

End = tuple[float, str, str]


class Curve(NamedTuple):
    """Runs that make one line."""

    name: str  # at the line's end
    hue: str  # its colour
    rows: Sequence[Sequence[Row]]  # of each run, with a key "step"
    style: Mapping[str, Any] = {}  # of the line


def along(axis: Axes, curves: Iterable[Curve], value: Callable[[Row], float | None], x: str = "step") -> list[End]:
    """Draws means over seeds along training, in bands from the lowest seed to the highest; a row of None is left out.

    Gives the lines' ends, for :func:`normkit.lab.report.drawing.name_ends` once the axis is final.
    """
    ends = []
    for name, hue, rows, style in curves:
        steps, middle, low, high = by_step(rows, value)
        if steps:
            band(axis, steps, middle, low, high, color=hue, **style)
            ends.append((middle[-1], name, hue))
    axis.set_xlabel(x)
    axis.margins(x=0)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return ends


def across(axis: Axes, name: str, hue: str, values: Mapping[float, Iterable[float | None]], **style: Any) -> list[End]:
    """Draws means over seeds at each value of a setting, in a band from lowest to highest; gives the line's end, if any."""
    found = {place: known(some) for place, some in values.items()}
    found = {place: some for place, some in found.items() if some}
    if not found:
        return []
    middle = [fmean(some) for some in found.values()]
    low, high = ([pick(some) for some in found.values()] for pick in (min, max))
    band(axis, list(found), middle, low, high, **{"color": hue, "marker": "o", "markersize": 3, **style})
    return [(middle[-1], name, hue)]


def dots(axis: Axes, y: float, values: Iterable[float | None], hue: str) -> None:
    """Draws a dot per seed on a row, and a bar at their mean."""
    there = known(values)
    axis.plot(there, [y] * len(there), "o", color=hue, markersize=3, alpha=0.5, markeredgewidth=0)
    if there:
        axis.plot([fmean(there)], [y], "|", color=hue, markersize=9, markeredgewidth=1.8)


def rows_of(axis: Axes, names: Sequence[str]) -> None:
    """Names the rows of a panel, the first on top, with a grid across them."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)


def marked(axis: Axes, places: Iterable[float], base: float = 10) -> None:
    """Gives a logarithmic x axis a tick at each place and none elsewhere."""
    places = list(places)
    axis.set_xscale("log", base=base)
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="minor", bottom=False)


def key(hue: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=hue, **style)
