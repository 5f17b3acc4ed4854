"""Short runs at many rates: the largest that learns, the lowest loss, and both as a table and a figure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from normkit.lab.report.drawing import FAINT, End, across
from normkit.lab.stats import ABSENT, Row, spread

GUESS = math.log(10)  # the loss of guessing one of ten classes
LEARNED = 0.9  # a loss below this part of guessing counts as learned


def by_rate(runs: Iterable[Row]) -> dict[float, list[float | None]]:
    """The losses at the end over seeds, by rate."""
    found: dict[float, list[float | None]] = {}
    for run in runs:
        found.setdefault(run["rate"], []).append(run["end"])
    return dict(sorted(found.items()))


def largest(runs: Sequence[Row]) -> list[float]:
    """For each seed the largest rate that learned; 0 where none did."""
    learned = [run for run in runs if run["end"] is not None and run["end"] < LEARNED * GUESS]
    seeds = sorted({run["seed"] for run in runs})
    return [max((run["rate"] for run in learned if run["seed"] == seed), default=0.0) for seed in seeds]


def lowest(runs: Iterable[Row]) -> tuple[float, float] | None:
    """The lowest mean loss at any rate, and that rate; a rate at which a seed diverged is passed over."""
    return min(((fmean(ends), rate) for rate, ends in by_rate(runs).items() if None not in ends), default=None)  # pyright: ignore[reportArgumentType]


def tell_rates(rates: Iterable[float]) -> str:
    """Lists a rate per seed."""
    return ", ".join(f"{rate:g}" for rate in rates)


def tell_lowest(found: tuple[float, float] | None) -> str:
    """Writes the lowest loss with its rate."""
    return ABSENT if found is None else f"{found[0]:.2f} (rate {found[1]:g})"


def losses(runs: Iterable[Row]) -> list[str]:
    """The cells of a table's row: the loss at each rate."""
    return [spread(ends, ".2f") for ends in by_rate(runs).values()]


def draw(axis: Axes, runs: Mapping[str, tuple[str, Sequence[Row]]], marks: Mapping[str, Any] = {}) -> list[End]:
    """Draws the loss at every rate, with that of guessing as a grey line."""
    ends = [end for name, (hue, some) in runs.items() for end in across(axis, name, hue, by_rate(some), **marks)]
    axis.axhline(GUESS, color=FAINT, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    return ends
