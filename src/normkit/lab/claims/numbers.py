"""Means over seeds as tables and sentences say them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

ABSENT = "–"


def known(values: Iterable[float | None]) -> list[float]:
    """The values that are there; a run that diverged has none."""
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known, or None.

    >>> mean([1.0, None, 3.0])
    2.0
    """
    values = known(values)
    return fmean(values) if values else None


def spread(values: Iterable[float | None], form: str = ".3f", scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, with how many runs have no value.

    Args:
        values: one a seed.
        form: of both numbers. Default: ".3f".
        scale: by which both are multiplied, such as 100 for percent. Default: 1.

    >>> spread([0.5, 0.7], ".1f", 100), spread([0.25, None], ".2f"), spread([None])
    ('60.0 ± 14.1', '0.25 (1 of 2 without)', '–')
    """
    values = list(values)
    there = [scale * value for value in known(values)]
    if not there:
        return ABSENT
    text = f"{fmean(there):{form}}" + (f" ± {stdev(there):{form}}" if len(there) > 1 else "")
    lost = len(values) - len(there)
    return f"{text} ({lost} of {len(values)} without)" if lost else text


def choose(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows whose keys have the wanted values.

    >>> choose([{"a": 1, "b": 2}, {"a": 3, "b": 2}], a=3)
    [{'a': 3, 'b': 2}]
    """
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def by_step(rows: Sequence[Sequence[Mapping[str, Any]]], value: Callable[[Mapping[str, Any]], float | None]) -> Any:
    """Steps, and at each the mean, lowest and highest value over runs that came so far.

    Args:
        rows: of each run, with a key ``"step"``.
        value: of a row.

    Returns:
        Four lists of one length.

    >>> by_step([[{"step": 1, "x": 2.0}], [{"step": 1, "x": 4.0}]], lambda row: row["x"])
    ([1], [3.0], [2.0], [4.0])
    """
    found: dict[int, list[float]] = {}
    for run in rows:
        for row in run:
            if (there := value(row)) is not None:
                found.setdefault(row["step"], []).append(there)
    steps = sorted(found)
    return steps, [fmean(found[s]) for s in steps], [min(found[s]) for s in steps], [max(found[s]) for s in steps]
