"""What experiments on fields share: rows that differ by recipe, their rates, runs and costs, paired gains, curves, pictures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from normkit.lab.experiment import Bench
from normkit.lab.models.rows import Scale
from normkit.lab.report.drawing import COLOURS, FULL, GREY, SHAPES, Curve
from normkit.lab.stats import OK, Interval, Row, Tried, gain, judge_runs, tune, where
from normkit.lab.train.cost import Costs

Function = Callable[[Any, Path], Row]


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
        self, bench: Bench, tried: Mapping[str, Sequence[Any]], look: Callable[[Row], Tried]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """By name what was found of the rates that are tried, and the job at the best."""
        rates = tune(bench, self.learn, tried, look)
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

    def subjects(self, result: Mapping[str, Any]) -> dict[Any, list[Row]]:
        """The runs by subject: its name, or a tuple of those that make it."""
        keys = dict.fromkeys(tuple(run[key] for key in self.subject) for run in result["runs"])
        found = {key: where(result["runs"], **dict(zip(self.subject, key, strict=True))) for key in keys}
        return {key[0] if len(key) == 1 else key: runs for key, runs in found.items()}

    @property
    def _names(self) -> dict[str, str]:
        return {row.folder: name for name, row in self.rows.items()}


def settings_of(job: Any) -> dict[str, Any]:
    """The settings of a job that all rows share."""
    hidden = ("scene", "solid", "kind", "row", "recipe", "seed", "scale", "rate")
    return {key: value for key, value in asdict(job).items() if key not in hidden}


def gained(runs: Sequence[Row], rows: Iterable[str], name: str, field: str) -> tuple[Interval, str]:
    """The gain of a row over the first of `rows`, paired by seed, and what it shows."""
    ours, base = where(runs, row=name), where(runs, row=next(iter(rows)))
    return gain(ours, base, field), judge_runs(ours, base, field)


def ends(runs: Iterable[Row]) -> list[Row]:
    """The last row of each curve."""
    return [run["curve"][-1] for run in runs if run["curve"]]


def lost(runs: Iterable[Row], of: str) -> list[str]:
    """Names the runs that diverged, in a sentence, or nothing."""
    names = [of.format(**run) for run in runs if run["status"] != OK]
    return [f"Diverged: {'; '.join(names)}."] if names else []


def curves(runs: Sequence[Row], rows: Iterable[str], x: str = "step") -> list[Curve]:
    """The curves of each row that was run, the first in grey."""
    found = []
    for place, name in enumerate(rows):
        lines = [[{**row, "step": row[x]} for row in run["curve"]] for run in where(runs, row=name)]
        hue = (GREY, *COLOURS)[place % (1 + len(COLOURS))]
        every = max(1, max(map(len, lines), default=0) // 5)
        style = {"marker": SHAPES[place % len(SHAPES)], "markevery": every, "markersize": 3}
        found.append(Curve(name, hue, lines, style))
    return found


def grid(down: int, across: int, height: float) -> tuple[Figure, Any]:
    """A figure for pictures, without axes and with little room between them."""
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.05, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(FULL, height), layout=layout)
    axes = figure.subplots(down, across, squeeze=False)
    axis: Axes
    for axis in axes.ravel():
        axis.set_axis_off()
    return figure, axes


def first_seed(runs: Iterable[Row], name: str) -> Row:
    """The run of a row whose pictures are shown."""
    return min(where(runs, row=name), key=lambda run: run["seed"])
