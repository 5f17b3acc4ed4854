"""The result of a comparison, and the curves of its runs."""

import math
from dataclasses import dataclass
from typing import Any


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

    result: dict[str, Any]
    runs: tuple[tuple[Log, ...], ...]

    @classmethod
    def of(cls, result: dict[str, Any]) -> "Comparison":
        """Gathers the curves of a result."""
        return cls(result, tuple(tuple(map(_log, recipe["runs"])) for recipe in result["recipes"]))

    @property
    def names(self) -> list[str]:
        """The recipes, in the order they were given."""
        return [recipe["recipe"] for recipe in self.result["recipes"]]


def _log(run: dict[str, Any]) -> Log:
    curve = run["curve"]
    return Log(
        seed=run["seed"],
        status=run["status"],
        epochs=tuple(range(1, len(curve["val_score"]) + 1)),
        seconds=tuple(curve["seconds"]),
        val_score=tuple(map(finite, curve["val_score"])),
        train_loss=tuple(map(finite, curve["train_loss"])),
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
