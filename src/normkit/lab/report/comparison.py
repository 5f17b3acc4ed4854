"""One comparison read back from its folder of records."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.lab.record import read_json
from normkit.lab.result import RESULT
from normkit.lab.train.trainer import read_run as read_records


@dataclass(frozen=True)
class Log:
    """One training: a recipe at its chosen rate with one seed, as logged epoch by epoch."""

    seed: int
    status: str
    epochs: tuple[int, ...]
    seconds: tuple[float, ...]
    val_score: tuple[float | None, ...]
    train_loss: tuple[float | None, ...]


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison and the curves of its runs, recipe by recipe in the order of the result."""

    out: Path
    result: dict[str, Any]
    runs: tuple[tuple[Log, ...], ...]

    @property
    def names(self) -> list[str]:
        """The recipes, in the order they were given."""
        return [recipe["recipe"] for recipe in self.result["recipes"]]


def read_comparison(out: Path) -> Comparison:
    """Reads OUT/result.json and the metrics of every run it names.

    Args:
        out: the folder that `normkit compare --output` wrote.

    Raises:
        RecordError: a record is missing or damaged; the message names the file and the cure.
    """
    result = read_json(out / "result.json", RESULT)
    runs = tuple(tuple(read_log(out, run) for run in recipe["runs"]) for recipe in result["recipes"])
    return Comparison(out, result, runs)


def read_log(out: Path, entry: dict[str, Any]) -> Log:
    """Reads the curves of one run."""
    _, metrics, timing = read_records(out / entry["run"])
    return Log(
        seed=entry["seed"],
        status=entry["status"],
        epochs=tuple(line["epoch"] for line in metrics),
        seconds=tuple(line["seconds"] for line in timing),
        val_score=tuple(finite(line["val_score"]) for line in metrics),
        train_loss=tuple(finite(line["train_loss"]) for line in metrics),
    )


def finite(value: Any) -> float | None:
    """A finite number, or None for null, NaN and infinity, which a diverged run may log."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def at(result: Any, path: str) -> Any:
    """The value at a dotted path, or None where the record has null on the way or lacks the last step.

    >>> at({"recipes": [{"rate": 0.1, "paired": None}]}, "recipes.0.rate")
    0.1
    >>> at({"recipes": [{"rate": 0.1, "paired": None}]}, "recipes.0.paired.mean") is None
    True
    """
    for step in path.split("."):
        if isinstance(result, list):
            result = result[int(step)] if int(step) < len(result) else None
        else:
            result = result.get(step) if isinstance(result, dict) else None
        if result is None:
            return None
    return result
