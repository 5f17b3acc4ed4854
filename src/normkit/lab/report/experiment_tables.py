"""Tables and sentences that experiments share: rates tried, scores at equal time, lowered condition numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from normkit.lab.experiment import Table
from normkit.lab.stats import OK, Tried, scored, spread

SAME = 0.02  # times as close as this count as the same


def time_table(
    title: str,
    costs: Mapping[str, Mapping[str, Any]],
    length: int,
    score: Callable[[str, int], Sequence[float | None]],
    *,
    what: str,
    unit: str = "epochs",
    every: int = 1,
    form: str = ".1f",
    scale: float = 100.0,
    notes: Sequence[str] = (),
) -> Table:
    """The table of what a step costs, and of ``score(row, count)`` after all of training and after the baseline's time."""
    base = next(iter(costs))
    lines = []
    for name, cost in costs.items():
        reached = within(length, cost["ratio"], every, cost["ratio_interval"])
        ends, then = (spread(score(name, count), form, scale) for count in (length, reached))
        lines.append(
            [name, f"{cost['ms_per_step']:.1f}", tell_ratio(cost), f"{cost['mb_per_step']:.1f}", ends, reached, then]
        )
    columns = [
        "method",
        "ms per step",
        "ratio [95 %]",
        "MB per step",
        f"{what} after {length:,} {unit}",
        f"{unit} in {base}'s time",
    ]
    whole = f"whole {unit}" if every == 1 else f"multiples of {every}"
    note = (
        f"Ratio: median over rounds of a step's time over {base}'s in the same round, all side by side in one process, with its "
        f"interval. {unit.capitalize()} in {base}'s time: {whole}, up to {length:,}; times within {100 * SAME:.0f} % count as "
        "the same, and so do those whose interval holds 1."
    )
    return Table(title, [*columns, f"{what} then"], lines, [note, *notes])


def tell_ratio(cost: Mapping[str, Any]) -> str:
    """Writes a step's time relative to the baseline's, with its interval where there is one."""
    ends = cost["ratio_interval"]
    return f"{cost['ratio']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def within(length: int, ratio: float, every: int = 1, interval: Sequence[float] | None = None) -> int:
    """Counts the epochs or steps of a method in the baseline's time: all, where the ratio's interval holds 1, or a multiple."""
    if interval and interval[0] <= 1 <= interval[1]:
        return length
    reached = math.floor(length / ratio * (1 + SAME))
    return length if reached >= length else reached // every * every


def rates_table(
    title: str,
    rows: Iterable[Mapping[str, Any]],
    note: str,
    *,
    form: str = ".1f",
    scale: float = 100.0,
    unit: str = "epoch",
) -> list[Table]:
    """The table of what each row reached at each rate; none where there was nothing to choose from."""
    rows = [row for row in rows if row["sweep"]]
    rates = sorted({run["rate"] for row in rows for run in row["sweep"]})
    if len(rates) < 2:
        return []
    lines = []
    for row in rows:
        runs = {run["rate"]: run for run in row["sweep"]}
        lines.append([row["name"], *(_tried(runs.get(rate), form, scale, unit) for rate in rates)])
    return [Table(title, ["method", *(f"{rate:g}" for rate in rates)], lines, [note])]


def edges(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Says of which rows the chosen rate is the smallest or the largest that was tried."""
    names = ", ".join(row["name"] for row in rows if row["edge"])
    return [f"The chosen rate is at the edge of those tried, a better one may lie beyond: {names}."] if names else []


def _tried(run: Tried | None, form: str, scale: float, unit: str) -> str | None:
    if run is None:
        return None
    if run["status"] != OK:
        return f"diverged in {unit} {run['reached'] + 1:,}"
    return f"{scale * run['score']:{form}}" if scored(run) else None


def lowered(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says by how much conditioning lowered condition numbers at the end of training, if any run is left."""
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
