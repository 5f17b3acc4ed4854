"""What experiments share: grids of jobs, the small network, fields' rows, captioned figures, runs at many rates, and words."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import nn

from normkit.lab import stats
from normkit.lab.data.cifar import download_missing, source
from normkit.lab.experiment import Bench, Drawing
from normkit.lab.models.rows import Scale
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.report.drawing import COLOURS, FAINT, FULL, GREY, SHAPES, Curve, End, across, panels
from normkit.lab.seeding import reseed
from normkit.lab.sweep import Job
from normkit.lab.train.cost import Costs
from normkit.lab.train.images import Images, device

CHANCE = 0.1  # the accuracy of guessing one of ten classes
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"data": "digits", "train": 128, "test": 64, "halve": False, "width": 4},  # seconds
    "small": {"data": "cifar10", "train": 1500, "test": 2000, "halve": True, "width": 16},
    "full": {"data": "cifar10", "train": None, "test": None, "halve": False, "width": 32},
}
SEEDS_ALONE = "Intervals and deviations cover seeds alone: all seeds share the images to learn from and to judge."
LEARNED = 0.9  # a loss below this part of guessing counts as learned


def size_of(bench: Bench, epochs: int) -> dict[str, Any]:
    """Fields of :class:`normkit.lab.train.images.Size` at a scale; `epochs` at the small one. Fetches data that is missing."""
    size = SIZES[bench.scale]
    if bench.download:
        download_missing(size["data"])
    return {**size, "epochs": bench.epochs or {"tiny": 1, "small": epochs, "full": 10}[bench.scale]}


def source_of(size: stats.Row, bench: Bench) -> dict[str, str]:
    """Where the images are from, to be kept with a result."""
    return {"source": source([size["data"]], bench.data_root)}


def labelled(
    bench: Bench, function: Callable[[Any, Path], stats.Row], jobs: Sequence[Job], *keys: str
) -> list[dict[str, Any]]:
    """Does jobs, and puts what tells a job apart before each result."""
    done = zip(jobs, bench.sweep(function, jobs), strict=True)
    return [{**{key: getattr(job, key) for key in keys}, **found} for job, found in done]


def grid(
    bench: Bench,
    function: Callable[[Any, Path], stats.Row],
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


def notes(result: stats.Row, *said: str) -> list[str]:
    """Notes below a table, with where its images are from and what its intervals cover."""
    return [*said, SEEDS_ALONE, *filter(None, [result.get("source")])]


def diverged(runs: Iterable[stats.Row], rest: str = "") -> str:
    """Says how many runs diverged, and what that means for the numbers."""
    runs = list(runs)
    return f"{sum(run['status'] != stats.OK for run in runs)} of {len(runs)} runs diverged{rest}."


def points(gaps: stats.Interval) -> str:
    """A mean difference of accuracies in points, with its interval if there is one."""
    assert gaps.mean is not None
    text = f"{100 * gaps.mean:+.1f} points"
    if gaps.low is None or gaps.high is None:
        return text
    return f"{text} ({100 * gaps.level:.0f} % interval {100 * gaps.low:+.1f} to {100 * gaps.high:+.1f})"


def side(gaps: stats.Interval, below: str, above: str, unsure: str = "not told apart") -> str:
    """Where the interval puts the first of two values."""
    return {stats.BETTER: above, stats.WORSE: below}.get(stats.judge(gaps.low, gaps.high), unsure)


GUESS = math.log(10)  # the loss of guessing one of ten classes


def by_rate(runs: Iterable[stats.Row]) -> dict[float, list[float | None]]:
    """The losses at the end over seeds, by rate."""
    found: dict[float, list[float | None]] = {}
    for run in runs:
        found.setdefault(run["rate"], []).append(run["end"])
    return dict(sorted(found.items()))


def largest(runs: Sequence[stats.Row]) -> list[float]:
    """For each seed the largest rate that learned; 0 where none did."""
    learned = [run for run in runs if run["end"] is not None and run["end"] < LEARNED * GUESS]
    seeds = sorted({run["seed"] for run in runs})
    return [max((run["rate"] for run in learned if run["seed"] == seed), default=0.0) for seed in seeds]


def lowest(runs: Iterable[stats.Row]) -> tuple[float, float] | None:
    """The lowest mean loss at any rate, and that rate; a rate at which a seed diverged is passed over."""
    return min(((fmean(ends), rate) for rate, ends in by_rate(runs).items() if None not in ends), default=None)  # pyright: ignore[reportArgumentType]


def losses(runs: Iterable[stats.Row]) -> list[str]:
    """The cells of a table's row: the loss at each rate."""
    return [stats.spread(ends, ".2f") for ends in by_rate(runs).values()]


def draw_rates(
    axis: Axes, runs: Mapping[str, tuple[str, Sequence[stats.Row]]], marks: Mapping[str, Any] = {}
) -> list[End]:
    """Draws the loss at every rate, with that of guessing as a grey line."""
    ends = [end for name, (hue, some) in runs.items() for end in across(axis, name, hue, by_rate(some), **marks)]
    axis.axhline(GUESS, color=FAINT, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    return ends


Function = Callable[[Any, Path], stats.Row]


class Trial(NamedTuple):
    """A row of a table: its folder, its recipe, and how its trunk's rows are scaled."""

    folder: str
    recipe: str
    scale: Scale = ""


class Study(NamedTuple):
    """The rows of a table on fields, what trains and what measures one of their jobs, and what tells a run's subject."""

    rows: Mapping[str, Trial]
    learn: Function
    measure: Function
    subject: tuple[str, ...]

    def choose(
        self, bench: Bench, tried: Mapping[str, Sequence[Any]], look: Callable[[stats.Row], stats.Tried]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """By name what was found of the rates that are tried, and the job at the best."""
        rates = stats.tune(bench, self.learn, tried, look)
        return rates, {name: replace(job, rate=rates[name]["rate"]) for name, (job, *_) in tried.items()}

    def train(self, bench: Bench, jobs: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """The runs, labelled, and the pictures of the first seed by subject and row."""
        names, runs, pictures = self._names, [], dict[str, dict[str, Any]]()
        for job, found in zip(jobs, bench.sweep(self.learn, jobs), strict=True):
            shown, about = found.pop("pictures"), {key: getattr(job, key) for key in self.subject}
            if job.seed == bench.seeds[0]:
                pictures.setdefault(" ".join(about.values()), {})[names[job.row]] = shown
            runs.append({**about, "row": names[job.row], "seed": job.seed, **found})
        return runs, pictures

    def cost(self, bench: Bench, jobs: Iterable[Any]) -> dict[str, Any]:
        """What a step of each row costs."""
        (found,) = bench.sweep(self.measure, [Costs(tuple(jobs))])
        return {self._names[folder]: cost for folder, cost in found.items()}

    def subjects(self, result: Mapping[str, Any]) -> dict[Any, list[stats.Row]]:
        """The runs by subject: its name, or a tuple of those that make it."""
        keys = dict.fromkeys(tuple(run[key] for key in self.subject) for run in result["runs"])
        found = {key: stats.where(result["runs"], **dict(zip(self.subject, key, strict=True))) for key in keys}
        return {key[0] if len(key) == 1 else key: runs for key, runs in found.items()}

    @property
    def _names(self) -> dict[str, str]:
        return {row.folder: name for name, row in self.rows.items()}


def settings_of(job: Any) -> dict[str, Any]:
    """The settings of a job that all rows share."""
    hidden = ("scene", "solid", "kind", "row", "recipe", "seed", "scale", "rate")
    return {key: value for key, value in asdict(job).items() if key not in hidden}


def gained(runs: Sequence[stats.Row], rows: Iterable[str], name: str, field: str) -> tuple[stats.Interval, str]:
    """The gain of a row over the first of `rows`, paired by seed, and what it shows."""
    ours, base = stats.where(runs, row=name), stats.where(runs, row=next(iter(rows)))
    return stats.gain(ours, base, field), stats.judge_runs(ours, base, field)


def ends(runs: Iterable[stats.Row]) -> list[stats.Row]:
    """The last row of each curve."""
    return [run["curve"][-1] for run in runs if run["curve"]]


def lost(runs: Iterable[stats.Row], of: str) -> list[str]:
    """Names the runs that diverged, in a sentence, or nothing."""
    names = [of.format(**run) for run in runs if run["status"] != stats.OK]
    return [f"Diverged: {'; '.join(names)}."] if names else []


def curves(runs: Sequence[stats.Row], rows: Iterable[str], x: str = "step") -> list[Curve]:
    """The curves of each row that was run, the first in grey."""
    found = []
    for place, name in enumerate(rows):
        lines = [[{**row, "step": row[x]} for row in run["curve"]] for run in stats.where(runs, row=name)]
        hue = (GREY, *COLOURS)[place % (1 + len(COLOURS))]
        every = max(1, max(map(len, lines), default=0) // 5)
        style = {"marker": SHAPES[place % len(SHAPES)], "markevery": every, "markersize": 3}
        found.append(Curve(name, hue, lines, style))
    return found


def picture_grid(down: int, across: int, height: float) -> tuple[Figure, Any]:
    """A figure for pictures, without axes and with little room between them."""
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.05, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(FULL, height), layout=layout)
    axes = figure.subplots(down, across, squeeze=False)
    axis: Axes
    for axis in axes.ravel():
        axis.set_axis_off()
    return figure, axes


def first_seed(runs: Iterable[stats.Row], name: str) -> stats.Row:
    """The run of a row whose pictures are shown."""
    return min(stats.where(runs, row=name), key=lambda run: run["seed"])
