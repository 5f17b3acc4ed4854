"""The result of a comparison, computed from the records of its runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from normkit.lab.schema import (
    COUNT,
    FLAG,
    FOLDER,
    NUMBER,
    OBJECT,
    POSITIVE,
    TEXT,
    each,
    fields,
    maybe,
    one_of,
    version,
)
from normkit.lab.stats import DIVERGED, OK, at_edge, best, differences
from normkit.lab.train.trainer import Run, read_run, validation

SCHEMA = 1
STATUS = one_of(OK, DIVERGED)
COST = fields(ms_per_step=NUMBER, ms_quartiles=each(NUMBER, count=2), ratio=maybe(NUMBER), mb_per_step=NUMBER)
CURVE = fields(raw=each(maybe(POSITIVE)), effective=each(maybe(POSITIVE)))
RECIPE = fields(
    recipe=TEXT,
    parameters=maybe(COUNT),
    changes=maybe(each(TEXT)),
    sweep=each(fields(rate=POSITIVE, seed=COUNT, val_score=maybe(NUMBER), status=STATUS, run=FOLDER)),
    rate=maybe(POSITIVE),
    rate_at_edge=FLAG,
    runs=each(
        fields(
            seed=COUNT,
            run=FOLDER,
            status=STATUS,
            val_score=maybe(NUMBER),
            best_val_score=maybe(NUMBER),
            test_score=maybe(NUMBER),
            test_loss=maybe(NUMBER),
            steps_to_target=maybe(COUNT),
            seconds_to_target=maybe(NUMBER),
        ),
        least=1,
    ),
    test_score=maybe(fields(mean=maybe(NUMBER), std=maybe(NUMBER), n=COUNT)),
    paired=maybe(
        fields(
            against=TEXT,
            mean=maybe(NUMBER),
            low=maybe(NUMBER),
            high=maybe(NUMBER),
            level=NUMBER,
            n=COUNT,
            differences=each(NUMBER),
        )
    ),
    cost=maybe(COST),
    condition=maybe(fields(first=CURVE, last=CURVE, mean=CURVE)),
)
# What ``result.json`` of a comparison holds.
RESULT = version(
    SCHEMA,
    fields(
        title=maybe(TEXT),
        command=TEXT,
        started=TEXT,
        finished=TEXT,
        seconds=NUMBER,
        config=OBJECT,
        environment=OBJECT,
        task=fields(kind=TEXT, score=TEXT, train=COUNT, val=COUNT, test=COUNT),
        baseline=TEXT,
        target=maybe(fields(score=maybe(NUMBER), rule=TEXT)),
        recipes=each(RECIPE, least=1),
    ),
)
OWN_RULE = "the highest validation score that every recipe reached in every seed"


class Records:
    """The records of one comparison's runs, each read once.

    Args:
        folder: of the comparison.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Run, tuple[Any, ...]] = {}

    def result(self, run: Run) -> dict[str, Any]:
        """Reads the result of a finished run."""
        return self._run(run)[0]

    def metrics(self, run: Run) -> list[dict[str, Any]]:
        """Reads the epochs of a run."""
        return self._run(run)[1]

    def seconds(self, run: Run, epochs: int) -> float:
        """Sums the training time of a run's first epochs, without validation."""
        return sum(row["seconds"] for row in self._run(run)[2][:epochs])

    def _run(self, run: Run) -> tuple[Any, ...]:
        if run not in self._read:
            self._read[run] = read_run(self.folder / run.path)
        return self._read[run]


def choose(records: Records, runs: Sequence[Run]) -> Run:
    """Chooses the run of a sweep with the highest validation score; of equals, the one with the lowest loss, then rate.

    Runs that diverged come last, the longest-lived first.

    Args:
        records: of the runs.
        runs: one a rate.
    """
    return best({"run": run, "rate": run.rate, **validation(records.result(run))} for run in runs)["run"]


def find_target(records: Records, runs: Iterable[Run], given: float | None) -> dict[str, Any]:
    """Finds the score whose time is taken: the lowest of the runs' best scores, or the one given.

    Args:
        records: of the runs.
        runs: all recipes at their rates, all seeds.
        given: by the user; None to find it.
    """
    if given is not None:
        return {"score": given, "rule": "the score given with --target"}
    found = [records.result(run) for run in runs]
    reached = [result["best_val_score"] for result in found if result["status"] == OK]
    rule = OWN_RULE if len(reached) == len(found) else f"{OWN_RULE}, runs that diverged left out"
    return {"score": min(reached, default=None), "rule": rule}


def summarize(
    records: Records,
    recipe: str,
    sweep: Sequence[Run],
    runs: Sequence[Run],
    baseline: Sequence[Run],
    target: float | None,
    level: float,
) -> dict[str, Any]:
    """Gathers what the records say of one recipe.

    Args:
        records: of all runs.
        recipe: canonical.
        sweep: its runs, one a rate.
        runs: its runs at the chosen rate, one a seed.
        baseline: the baseline's runs, in the same order of seeds.
        target: the score whose time is taken; None when no run has one.
        level: coverage of the interval.
    """
    tests = [score for run in runs if (score := records.result(run)["test_score"]) is not None]
    return {
        "recipe": recipe,
        "sweep": [_sweep_row(records, run) for run in sweep],
        "rate": runs[0].rate,
        "rate_at_edge": at_edge(runs[0].rate, [{"rate": run.rate} for run in sweep]),
        "runs": [_run_row(records, run, target) for run in runs],
        "test_score": {
            "mean": fmean(tests) if tests else None,
            "std": stdev(tests) if len(tests) > 1 else None,
            "n": len(tests),
        },
        "paired": _paired(records, runs, baseline, level),
        "condition": _condition([records.metrics(run) for run in runs if records.result(run)["status"] == OK]),
    }


def _sweep_row(records: Records, run: Run) -> dict[str, Any]:
    found = records.result(run)
    kept = {key: found[key] for key in ("val_score", "val_loss", "status")}
    return {"rate": run.rate, "seed": run.seed, **kept, "run": run.path}


def _run_row(records: Records, run: Run, target: float | None) -> dict[str, Any]:
    found = records.result(run)
    row = {"seed": run.seed, "run": run.path}
    row |= {key: found[key] for key in ("status", "val_score", "best_val_score", "test_score", "test_loss")}
    reached = None
    if target is not None:
        reached = next((line for line in records.metrics(run) if line["val_score"] >= target), None)
    steps = reached["step"] if reached else None
    return {
        **row,
        "steps_to_target": steps,
        "seconds_to_target": records.seconds(run, reached["epoch"]) if reached else None,
    }


def _paired(records: Records, runs: Sequence[Run], baseline: Sequence[Run], level: float) -> dict[str, Any]:
    ours, theirs = ([records.result(run)["test_score"] for run in of] for of in (runs, baseline))
    found = differences(ours, theirs, level)
    return {"against": baseline[0].recipe, "n": len(found.differences), **asdict(found)}


def _condition(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    if not runs or not all(run and run[0]["condition"] for run in runs):
        return None
    names = list(runs[0][0]["condition"])
    epochs = range(len(runs[0]))

    def curve(layers: Sequence[str], side: int) -> list[float | None]:
        return [_geometric(run[epoch]["condition"][name][side] for run in runs for name in layers) for epoch in epochs]

    def both(layers: Sequence[str]) -> dict[str, Any]:
        return {"raw": curve(layers, 0), "effective": curve(layers, 1)}

    return {
        "first": {"name": names[0], **both(names[:1])},
        "last": {"name": names[-1], **both(names[-1:])},
        "mean": {"layers": len(names), **both(names)},
    }


def _geometric(values: Iterable[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value]
    return math.exp(fmean(logs)) if logs else None
