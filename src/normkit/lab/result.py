"""The result of a comparison, computed from its runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from normkit.lab.inference import holm, over_seeds, over_seeds_and_samples
from normkit.lab.stats import OK, Tried, at_edge, differences

OWN_RULE = "the highest validation score that every recipe reached in every seed"
KEPT = ("status", "val_score", "best_val_score", "test_score", "test_loss")


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    seed: int
    path: str  # of its folder, within that of the comparison
    result: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]  # a row per epoch
    timing: Sequence[Mapping[str, Any]]  # likewise
    marks: np.ndarray | None = None  # what each test sample adds to the score

    def row(self, target: float | None) -> dict[str, Any]:
        """What a result says of it."""
        reached = next((line for line in self.metrics if target is not None and line["val_score"] >= target), None)
        seconds = [line["seconds"] for line in self.timing]
        return {
            "seed": self.seed,
            "run": self.path,
            **{key: self.result[key] for key in KEPT},
            "steps_to_target": reached["step"] if reached else None,
            "seconds_to_target": sum(seconds[: reached["epoch"]]) if reached else None,
            "curve": {key: [line[key] for line in self.metrics] for key in ("train_loss", "val_score")}
            | {"seconds": seconds},
        }


def find_target(runs: Iterable[Trained], given: float | None) -> dict[str, Any]:
    """Finds the score whose time is taken: the lowest of the runs' best scores, or the one given."""
    if given is not None:
        return {"score": given, "rule": "the score given with --target"}
    found = [run.result for run in runs]
    reached = [result["best_val_score"] for result in found if result["status"] == OK]
    rule = OWN_RULE if len(reached) == len(found) else f"{OWN_RULE}, runs that diverged left out"
    return {"score": min(reached, default=None), "rule": rule}


@dataclass(frozen=True)
class Judge:
    """How recipes are compared with the baseline."""

    against: str  # the baseline's name
    baseline: Sequence[Trained]  # its runs, one a seed
    level: float  # coverage of the intervals
    # (samples,) of the test split, see sizes, so that intervals cover the draw of its samples too
    sizes: np.ndarray | None = None
    sign: int = 1  # 1 where marks count for a recipe, -1 where against it

    def scores(self, runs: Sequence[Trained]) -> dict[str, Any]:
        """Mean and spread of the test scores, and the paired difference from the baseline."""
        ours, theirs = ([run.result["test_score"] for run in of] for of in (runs, self.baseline))
        tests = [score for score in ours if score is not None]
        found = differences(ours, theirs, self.level)
        paired = {"against": self.against, "n": len(found.differences), **asdict(found), "covers": ["seeds"]}
        spread = over_seeds(found.differences)
        if self.sizes is not None and spread is not None:
            pairs = zip(runs, self.baseline, ours, theirs, strict=True)
            gains = [self._gains(one, other) for one, other, *scored in pairs if None not in scored]
            spread = over_seeds_and_samples(np.stack(gains), self.sizes)
            assert spread is not None
            low, high = spread.ends(self.level)
            paired |= {"low": low, "high": high, "covers": ["seeds", "test samples"]}
        return {
            "test_score": {
                "mean": fmean(tests) if tests else None,
                "std": stdev(tests) if len(tests) > 1 else None,
                "n": len(tests),
            },
            "paired": {**paired, "p": spread and spread.p},
        }

    def _gains(self, one: Trained, other: Trained) -> np.ndarray:
        assert one.marks is not None
        assert other.marks is not None
        return self.sign * (one.marks - other.marks)


def summarize(
    runs: Sequence[Trained], judge: Judge, rate: float, sweep: Sequence[Tried], target: float | None
) -> dict[str, Any]:
    """Gathers what the runs say of one recipe: those at the chosen rate, and the sweep of all rates that were tried."""
    return {
        "sweep": sweep,
        "rate": rate,
        "rate_at_edge": at_edge(rate, sweep),
        "runs": [run.row(target) for run in runs],
        **judge.scores(runs),
        "condition": _condition([run.metrics for run in runs if run.result["status"] == OK]),
    }


def adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to the paired difference of each recipe its p-value among all that are compared, by Holm's procedure."""
    adjusted = holm({row["recipe"]: row["paired"]["p"] for row in rows[1:]})
    for row in rows:
        row["paired"]["holm"] = adjusted.get(row["recipe"])


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
