"""One comparison read back from its folder of records."""

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from normkit.core.errors import RecordError
from normkit.lab.record import read_json, read_lines

SCHEMA = 1
CURE = "run the same `normkit compare` command again with this --output, or name another folder"


@dataclass(frozen=True)
class Run:
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
    runs: tuple[tuple[Run, ...], ...]

    @property
    def names(self) -> list[str]:
        """The recipes, in the order they were given."""
        return [recipe["recipe"] for recipe in self.result["recipes"]]


def read_comparison(out: Path) -> Comparison:
    """Reads OUT/result.json and the metrics of every run it names.

    Args:
        out: the folder that `normkit compare --output` wrote.

    Raises:
        RecordError: a record is missing, is not JSON or lacks a field; the message names the file and the cure.
    """
    path = out / "result.json"
    result = read_json(path)
    check(result, path)
    runs = tuple(tuple(read_run(out, run, path) for run in recipe["runs"]) for recipe in result["recipes"])
    return Comparison(out, result, runs)


def check(result: dict[str, Any], path: Path) -> None:
    """Refuses a result that is not one of a comparison or is of another schema."""
    if result.get("schema") != SCHEMA:
        raise RecordError(f"{path}: got schema {result.get('schema')!r}, this normkit reads schema {SCHEMA}; {CURE}")
    for key, kind in {"config": dict, "environment": dict, "task": dict, "baseline": str, "recipes": list}.items():
        if not isinstance(result.get(key), kind):
            raise RecordError(f"{path}: no {kind.__name__} named {key!r}; {CURE}")
    if not result["recipes"]:
        raise RecordError(f"{path}: it holds no recipe; {CURE}")
    for index, recipe in enumerate(result["recipes"]):
        for key, kind in {"recipe": str, "runs": list, "sweep": list}.items():
            if not isinstance(recipe, dict) or not isinstance(recipe.get(key), kind):
                raise RecordError(f"{path}: recipe {index} has no {kind.__name__} named {key!r}; {CURE}")
        for entry in recipe["runs"] + recipe["sweep"]:
            if not isinstance(entry, dict) or not isinstance(entry.get("run"), str) or "status" not in entry:
                raise RecordError(f"{path}: a run of recipe {recipe['recipe']!r} names no folder or status; {CURE}")


def read_run(out: Path, entry: dict[str, Any], result: Path) -> Run:
    """Reads the curves of one run; its folder must lie inside the comparison's."""
    place = PurePosixPath(entry["run"])
    if place.is_absolute() or ".." in place.parts:
        raise RecordError(f"{result}: run folder {entry['run']!r} lies outside the comparison; {CURE}")
    metrics = read_lines(out / place / "metrics.jsonl", ("epoch", "val_score", "train_loss"))
    timing = read_lines(out / place / "timing.jsonl", ("seconds",))
    try:
        return Run(
            seed=int(entry.get("seed", 0)),
            status=str(entry["status"]),
            epochs=tuple(int(line["epoch"]) for line in metrics),
            seconds=tuple(float(line["seconds"]) for line in timing),
            val_score=tuple(finite(line["val_score"]) for line in metrics),
            train_loss=tuple(finite(line["train_loss"]) for line in metrics),
        )
    except (TypeError, ValueError) as error:
        raise RecordError(f"{out / place}: a seed, epoch or time is no number ({error}); {CURE}") from None


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
