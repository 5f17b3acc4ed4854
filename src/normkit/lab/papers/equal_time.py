"""Equal time beside equal length: what each row of a table has reached when the baseline's time is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normkit.lab.claims.numbers import spread
from normkit.lab.experiment import Table

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
    """The table of what a step costs, and of scores after all of training and after the baseline's time.

    Args:
        title: of the table.
        costs: by row, the baseline first, what :func:`normkit.lab.cost.measure_steps` gave.
        length: of a run, in `unit`.
        score: of a row after so many, one a seed; None for a run that did not come so far.
        what: the score is, as a heading.
        unit: ``"epochs"`` or ``"steps"``. Default: ``"epochs"``.
        every: how many lie between two scores. Default: 1.
        form: of the scores. Default: ``".1f"``.
        scale: by which they are multiplied. Default: 100.
        notes: below it, after what all such tables say. Default: none.
    """
    base = next(iter(costs))
    lines = []
    for name, cost in costs.items():
        reached = within(length, cost["ratio"], every, cost["ratio_interval"])
        ends, then = (spread(score(name, count), form, scale) for count in (length, reached))
        lines.append(
            [
                name,
                f"{cost['ms_per_step']:.1f}",
                tell_ratio(cost),
                f"{cost['mb_per_step']:.1f}",
                ends,
                reached,
                then,
            ]
        )
    columns = [
        "method",
        "ms a step",
        "ratio [95 %]",
        "MB a step",
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
    """Writes a step's time relative to the baseline's, with its interval where there is one.

    Args:
        cost: of one row, of what :func:`normkit.lab.cost.measure_steps` gave.

    >>> tell_ratio({"ratio": 1.06, "ratio_interval": (1.0204, 1.09)}), tell_ratio({"ratio": 1.0, "ratio_interval": None})
    ('1.060 [1.020, 1.090]', '1.000')
    """
    ends = cost["ratio_interval"]
    return f"{cost['ratio']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def within(length: int, ratio: float, every: int = 1, interval: Sequence[float] | None = None) -> int:
    """Counts the epochs, or steps, that a method comes through in the baseline's time.

    Args:
        length: of a run.
        ratio: of its time to the baseline's.
        every: what the count is a multiple of, unless it is the whole run. Default: 1.
        interval: of the ratio; where it holds 1 the times are not told apart, and the count is the whole run. Default: none.

    >>> within(10, 1.25), within(10, 1.015), within(10, 0.8), within(1000, 1.1, 50), within(10, 1.25, interval=(0.98, 1.3))
    (8, 10, 10, 900, 10)
    """
    if interval and interval[0] <= 1 <= interval[1]:
        return length
    reached = math.floor(length / ratio * (1 + SAME))
    return length if reached >= length else reached // every * every
