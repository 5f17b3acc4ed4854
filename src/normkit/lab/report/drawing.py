"""What the figures of experiments share: how they are written, bands over seeds, and names at the ends of lines."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from normkit.lab.experiment import Drawing
from normkit.lab.record import write_bytes
from normkit.lab.report.canvas import LOOK, plain
from normkit.lab.report.palette import BASELINE, HUES, MARKERS

DPI = 200
FRAME, LAST = 80, 2500  # milliseconds for which a frame of what moves stays, and its last one
GREY = BASELINE[0]
COLOURS = [light for light, _ in HUES]
SHAPES = list(MARKERS)
SEEDS = "lines are means over seeds, in bands from the lowest seed to the highest"  # in captions


class Motion(NamedTuple):
    """A figure that moves."""

    figure: Figure  # as its last frame shows it
    frames: int  # how many
    show: Callable[[int], object]  # makes the figure show the frame of a number, from 0


def save(figures: Iterable[Drawing], folder: Path, dpi: int | None = None) -> list[Path]:
    """Draws figures in the look of the reports, and writes each as PNG and SVG, by which they are known to be ours.

    What moves is written as GIF too, at half the resolution.
    The same records and the same matplotlib give the same bytes.
    """
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
    """Names lines at the right edge of a panel, moved apart where they would overlap.

    `ends` are value, name and colour of each line, on an axis whose limits and scale are final; `gap` is the least
    distance between names, in parts of the panel's height.
    """
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
