"""What experiments share: grids of jobs, the small network and its sizes, captioned figures, runs at many rates, and words."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from normkit.lab.data.cifar import download_missing, source
from normkit.lab.experiment import Bench, Drawing
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.report.drawing import FAINT, FULL, End, across, panels
from normkit.lab.seeding import reseed
from normkit.lab.stats import ABSENT, BETTER, WORSE, Interval, Row, judge, spread
from normkit.lab.sweep import Job
from normkit.lab.train.images import Images
from normkit.lab.train.walk import OK, device

CHANCE = 0.1  # the accuracy of guessing one of ten classes
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"data": "digits", "train": 128, "test": 64, "halve": False, "width": 4},  # seconds
    "small": {"data": "cifar10", "train": 1500, "test": 2000, "halve": True, "width": 16},
    "full": {"data": "cifar10", "train": None, "test": None, "halve": False, "width": 32},
}
SEEDS_ALONE = "Intervals and deviations cover seeds alone: all seeds share the images to learn from and to judge."


def size_of(bench: Bench, epochs: int) -> dict[str, Any]:
    """Fields of :class:`normkit.lab.train.images.Size` at a scale; `epochs` at the small one. Fetches data that is missing."""
    size = SIZES[bench.scale]
    if bench.download:
        download_missing(size["data"])
    return {**size, "epochs": bench.epochs or {"tiny": 1, "small": epochs, "full": 10}[bench.scale]}


def source_of(size: Row, bench: Bench) -> dict[str, str]:
    """Where the images are from, to be kept with a result."""
    return {"source": source([size["data"]], bench.data_root)}


def labelled(
    bench: Bench, function: Callable[[Any, Path], Row], jobs: Sequence[Job], *keys: str
) -> list[dict[str, Any]]:
    """Does jobs, and puts what tells a job apart before each result."""
    done = zip(jobs, bench.sweep(function, jobs), strict=True)
    return [{**{key: getattr(job, key) for key in keys}, **found} for job, found in done]


def grid(
    bench: Bench,
    function: Callable[[Any, Path], Row],
    make: Callable[..., Job],
    factors: Mapping[str, Iterable[Any]],
    **fixed: Any,
) -> list[dict[str, Any]]:
    """Does a job for each seed and combination of the factors' values, and labels each result by them."""
    each = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    jobs = [make(**one, seed=seed, **fixed) for seed in bench.seeds for one in each]
    return labelled(bench, function, jobs, *factors, "seed")


def network(job: Any, images: Mapping[str, Images], norm: Callable[[int], nn.Module], hidden: int = 0) -> SmallCNN:
    """The small network of a job's width and seed, for its images."""
    reseed(job.seed, "init")
    return SmallCNN(norm, channels=images["train"][0].shape[1], width=job.width, hidden=hidden).to(device())


def drawn(name: str, caption: str, moves: bool = False) -> Callable[[Callable[[Any], Any]], Callable[[Any], Drawing]]:
    """Makes a function that draws a result a figure of the report; fields of the caption are the result's."""
    return lambda make: lambda result: Drawing(name, lambda: make(result), caption.format_map(result), moves)


def titled(height: float, *titles: str, width: float = FULL, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, side by side."""
    figure, axes = panels(len(titles), width, height, **options)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left")
    return figure, axes


def drawings(*figures: Callable[[Any], Drawing]) -> Callable[[Any], list[Drawing]]:
    """The figures of an experiment, in their order."""
    return lambda result: [figure(result) for figure in figures]


def notes(result: Row, *said: str) -> list[str]:
    """Notes below a table, with where its images are from and what its intervals cover."""
    return [*said, SEEDS_ALONE, *filter(None, [result.get("source")])]


def diverged(runs: Iterable[Row], rest: str = "") -> str:
    """Says how many runs diverged, and what that means for the numbers."""
    runs = list(runs)
    return f"{sum(run['status'] != OK for run in runs)} of {len(runs)} runs diverged{rest}."


def points(gaps: Interval) -> str:
    """A mean difference of accuracies in points, with its interval if there is one."""
    assert gaps.mean is not None
    text = f"{100 * gaps.mean:+.1f} points"
    if gaps.low is None or gaps.high is None:
        return text
    return f"{text} ({100 * gaps.level:.0f} % interval {100 * gaps.low:+.1f} to {100 * gaps.high:+.1f})"


def side(gaps: Interval, below: str, above: str, unsure: str = "not told apart") -> str:
    """Where the interval puts the first of two values."""
    return {BETTER: above, WORSE: below}.get(judge(gaps.low, gaps.high), unsure)


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


def draw_rates(axis: Axes, runs: Mapping[str, tuple[str, Sequence[Row]]], marks: Mapping[str, Any] = {}) -> list[End]:
    """Draws the loss at every rate, with that of guessing as a grey line."""
    ends = [end for name, (hue, some) in runs.items() for end in across(axis, name, hue, by_rate(some), **marks)]
    axis.axhline(GUESS, color=FAINT, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    return ends
