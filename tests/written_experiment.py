"""Norms of a small network on digits: a whole experiment in a file.

Each norm tries two rates with the first seed, and learns at its better one with every seed.
"""

from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from normkit.core.card import Paper
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.report.drawing import COLUMN, panels
from normkit.lab.report.experiment_tables import rates_table
from normkit.lab.stats import gain, judge_runs, spread, tell, tune, where
from normkit.lab.train.learning import Training, learn
from normkit.lab.train.trainer import validation

NORMS = {"bn": "BatchNorm", "ln": "LayerNorm"}
BASE = Training("digits", "inception", "", "", 0.0, 0, epochs=1, batch_size=64, condition=False)
PAPER = Paper("Author, An", "A title", 2020, "https://example.org")


def run(bench: Bench) -> dict[str, Any]:
    """Tunes each norm, and learns with it."""
    bases = {norm: replace(BASE, name=name, recipe=norm, seed=bench.seeds[0]) for norm, name in NORMS.items()}
    tried = {norm: [replace(base, rate=rate) for rate in (0.1, 1.0)] for norm, base in bases.items()}
    rows = tune(bench, learn, tried, validation)
    jobs = [replace(bases[norm], rate=rows[norm]["rate"], seed=seed) for norm in NORMS for seed in bench.seeds]
    done = zip(jobs, bench.sweep(learn, jobs), strict=True)
    runs = [{"norm": job.recipe, "seed": job.seed, "test": found["test_score"]} for job, found in done]
    return {"rows": [{"name": NORMS[norm], **row} for norm, row in rows.items()], "runs": runs}


def tables(result: dict[str, Any]) -> list[Table]:
    """Accuracies, gains and rates."""
    runs = {norm: where(result["runs"], norm=norm) for norm in NORMS}
    found = {norm: (spread(run["test"] for run in runs[norm]), gain(runs[norm], runs["bn"], "test")) for norm in NORMS}
    lines = [[NORMS[norm], scores, tell(better)] for norm, (scores, better) in found.items()]
    rates = rates_table("Rates", result["rows"], "Accuracy on held-out images, %.")
    return [Table("Accuracy", ("norm", "test", "gain over BatchNorm"), lines), *rates]


def figures(result: dict[str, Any]) -> list[Drawing]:
    """Dots."""

    def make() -> Figure:
        figure, (axis,) = panels(1, COLUMN, 2.0)
        axis.plot([run["norm"] for run in result["runs"]], [run["test"] for run in result["runs"]], "o")
        return figure

    return [Drawing("accuracy", make, "Test accuracy; a dot is a seed.")]


def remarks(result: dict[str, Any]) -> list[str]:
    """The verdict."""
    return [f"LayerNorm: {judge_runs(*(where(result['runs'], norm=norm) for norm in ('ln', 'bn')), 'test')}."]


EXPERIMENT = Experiment("norms", "claim", "Norms", "One wins.", PAPER, run, tables, figures, remarks, ("tiny",))
