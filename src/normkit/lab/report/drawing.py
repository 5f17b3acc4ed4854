"""Figures: the look of a paper, colours of recipes, panels and scales, lines in bands over seeds, and how they are written."""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import wrap
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from normkit.lab.experiment import Drawing
from normkit.lab.record import write_bytes
from normkit.lab.stats import Row, by_step, known

Line = Literal["-", "--", "-.", ":"]
BASELINE = ("#4a4a4a", "#c4c4c4")  # grey, so that what is compared with it stands out
# Okabe and Ito's, https://jfly.uni-koeln.de/color, darkened or lightened to keep contrast with a light or a dark ground: people
# with any common colour blindness tell them apart. Markers and dashes say the same once more, for print without colour.
HUES = (
    ("#0072b2", "#56a9e0"),
    ("#d55e00", "#f0803c"),
    ("#00896a", "#2fc59d"),
    ("#a64d83", "#e08fc0"),
    ("#b07900", "#e6a92b"),
    ("#2f8fc4", "#8fd0f5"),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Line, ...] = ("-", "--", "-.", ":")
GREY, COLOURS, SHAPES = BASELINE[0], [light for light, _ in HUES], list(MARKERS)
COLUMN = 3.4  # inches: one column of a two-column page
FULL = 7.0
NAME = 24  # letters per line of a name
INK, FAINT, GRID = "#222222", "#8a8a8a", "#e3e3e3"
DPI = 200
FRAME, LAST = 80, 2500  # milliseconds for which a frame of what moves stays, and its last one
SEEDS = "lines are means over seeds, in bands from the lowest seed to the highest"  # in captions


@dataclass(frozen=True)
class Style:
    """How one recipe is drawn: colours on a light and a dark ground, marker and dash by matplotlib's letters."""

    light: str
    dark: str
    marker: str
    line: Line


def styles(names: list[str], baseline: str) -> list[Style]:
    """A style for each recipe; hues, markers and dashes turn at different periods, so that few pairs repeat."""
    chosen, others = [], 0
    for index, name in enumerate(names):
        light, dark = BASELINE if name == baseline else HUES[others % len(HUES)]
        turn = 0 if name == baseline else others // len(HUES)
        others += name != baseline
        chosen.append(Style(light, dark, MARKERS[(index + turn) % len(MARKERS)], DASHES[turn % len(DASHES)]))
    return chosen


DOTTED: Any = (0, (1, 1.2))
LOOK: dict[Any, Any] = matplotlib.rc_params_from_file(
    Path(__file__).with_name("paper.mplstyle"), use_default_template=False
)


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


class Motion(NamedTuple):
    """A figure that moves."""

    figure: Figure  # as its last frame shows it
    frames: int  # how many
    show: Callable[[int], object]  # makes the figure show the frame of a number, from 0


def save(figures: Iterable[Drawing], folder: Path, dpi: int | None = None) -> list[Path]:
    """Draws figures in the look of the reports, and writes each as PNG and SVG, by which they are known to be ours."""
    written = []
    for figure in figures:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **LOOK}):
            made = figure.make()
            drawn = made.figure if figure.moves else made
            drawn.draw_without_rendering()
            drawn.set_layout_engine("none")  # the places are found; each file would compute them again
            if figure.moves:
                written.append(folder / figure.file)
                write_bytes(written[-1], _gif(made, (dpi or DPI) // 2))
            for kind, metadata in {"png": {"Software": "normkit"}, "svg": {"Date": None, "Creator": "normkit"}}.items():
                buffer = io.BytesIO()
                drawn.savefig(buffer, format=kind, dpi=dpi or DPI, metadata=metadata)
                written.append(folder / f"{figure.name}.{kind}")
                write_bytes(written[-1], buffer.getvalue())
    return written


def _gif(motion: Motion, dpi: int) -> bytes:
    # matplotlib's writer of GIFs would not hold the last frame, nor say whose file it is.
    frames = []
    for number in range(motion.frames):
        motion.show(number)
        buffer = io.BytesIO()
        motion.figure.savefig(buffer, format="png", dpi=dpi)
        with Image.open(buffer) as image:
            frames.append(image.convert("RGB").quantize(64, Image.Quantize.FASTOCTREE))  # median cut mixes rare hues
    buffer, lasts = io.BytesIO(), [FRAME] * (motion.frames - 1) + [LAST]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=lasts, loop=0, comment=b"normkit")
    return buffer.getvalue()


def band(
    axis: Axes, x: Sequence[float], middle: Sequence[float], low: Sequence[float], high: Sequence[float], **style: Any
):
    """A line of means in a band from the lowest to the highest."""
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(x, middle, **style)


def name_ends(axis: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.055) -> None:
    """Names lines (value, name, colour) at the right edge of a panel whose limits are final, `gap` of its height apart."""
    low, high = axis.get_ylim()
    scale = axis.yaxis.get_transform()
    bottom, top, *values = (float(y) for y in scale.transform([low, high, *(value for value, _, _ in ends)]))
    places = sorted(
        (min(max((y - bottom) / (top - bottom), 0.0), 1.0), name, colour)
        for y, (_, name, colour) in zip(values, ends, strict=True)
    )
    if not places:
        return
    at = [place for place, _, _ in places]
    # Push up what is too close, then push the whole stack down again from the top.
    for k in range(1, len(at)):
        at[k] = max(at[k], at[k - 1] + gap)
    at[-1] = min(at[-1], 1.0)
    for k in range(len(at) - 2, -1, -1):
        at[k] = min(at[k], at[k + 1] - gap)
    for y, (_, name, colour) in zip(at, places, strict=True):
        axis.text(1.01, y, plain(name), color=colour, transform=axis.transAxes, va="center", fontsize=7)


End = tuple[float, str, str]


class Curve(NamedTuple):
    """Runs that make one line."""

    name: str  # at the line's end
    hue: str  # its colour
    rows: Sequence[Sequence[Row]]  # of each run, with a key "step"
    style: Mapping[str, Any] = {}  # of the line


def along(axis: Axes, curves: Iterable[Curve], value: Callable[[Row], float | None], x: str = "step") -> list[End]:
    """Draws means over seeds along training, in bands from the lowest seed to the highest; a row of None is left out."""
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
