"""Gains over a baseline, seed by seed, as tables and sentences tell them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from normkit.lab.interval import Interval, differences

BETTER, WORSE, EVEN = "better", "worse", "no difference shown"


def gain(runs: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]], field: str) -> Interval:
    """Bounds the mean gain of some runs over a baseline's of the same seeds.

    Args:
        runs: each with ``"seed"`` and `field`; None there is left out.
        base: the baseline's.
        field: what is compared.

    >>> gain([{"seed": 0, "x": 3.0}, {"seed": 1, "x": 5.0}], [{"seed": 1, "x": 4.0}], "x").differences
    (1.0,)
    """
    known = {run["seed"]: run[field] for run in base}
    shared = [run for run in runs if run["seed"] in known]
    return differences([run[field] for run in shared], [known[run["seed"]] for run in shared])


def judge(runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], field: str) -> str:
    """Says what the gain of some runs over a baseline's of the same seeds shows.

    Args:
        runs: each with ``"seed"`` and `field`, of which more is better; None there for a run that diverged.
        base: the baseline's.
        field: what is compared.

    Returns:
        ``"better"`` or ``"worse"`` where the interval excludes 0, else ``"no difference shown"``; or why it is not judged: there
        is one seed, or a run diverged, on either side, and those that are left were chosen by how they fared.

    >>> base = [{"seed": seed, "x": x} for seed, x in enumerate((1.0, 2.0, 4.0))]
    >>> judge([{**run, "x": 1.1 * run["x"] + 5} for run in base], base, "x"), judge(base, base, "x"), judge(base[:1], base, "x")
    ('better', 'no difference shown', 'one seed, no interval')
    >>> judge([*base[:2], {"seed": 2, "x": None}], base, "x")
    '2 of 3 seeds, not judged'
    """
    found = gain(runs, base, field)
    seeds, pairs = len({run["seed"] for run in runs} & {run["seed"] for run in base}), len(found.differences)
    if pairs < seeds:
        return f"{pairs} of {seeds} seeds, not judged"
    if found.low is None or found.high is None:
        return "one seed, no interval"
    if math.isclose(found.low, found.high):
        # Scores come in whole samples, so a few seeds can agree but for rounding by chance: no spread to judge by.
        return EVEN
    return BETTER if found.low > 0 else WORSE if found.high < 0 else EVEN


def lowered(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says by how much conditioning lowered condition numbers at the end of training.

    Args:
        runs: of conditioned networks, each with a ``"curve"`` whose rows hold ``"raw_condition"`` and ``"condition"``; a run
            with None at its end, as of a singular weight, is left out.

    Returns:
        A sentence, or nothing where no run is left.

    >>> lowered([{"curve": [{"raw_condition": 100.0, "condition": 98.0}]}])[0][:70]
    'At the end the conditioned weights have a condition number 2.0 % below'
    """
    ends = [(run["curve"][-1]["condition"], run["curve"][-1]["raw_condition"]) for run in runs if run["curve"]]
    logs = [math.log(condition / raw) for condition, raw in ends if None not in (condition, raw)]
    if not logs:
        return []
    ratio = math.exp(fmean(logs))
    return [
        f"At the end the conditioned weights have a condition number {abs(1 - ratio):.1%} ".replace("%", " %")
        + f"{'below' if ratio <= 1 else 'above'} that of the weights they are made from (geometric mean): rows that differ "
        "little in norm leave equilibration little to do."
        if ratio > 0.9
        else f"At the end the conditioned weights have {ratio:.2f} times the condition number of those they are made from."
    ]
