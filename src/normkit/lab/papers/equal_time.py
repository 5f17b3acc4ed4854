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
        reached = within(length, cost["ratio"], every)
        ends, then = (spread(score(name, count), form, scale) for count in (length, reached))
        lines.append(
            [
                name,
                f"{cost['ms_per_step']:.1f}",
                f"{cost['ratio']:.3f}",
                f"{cost['mb_per_step']:.1f}",
                ends,
                reached,
                then,
            ]
        )
    columns = [
        "method",
        "ms a step",
        "ratio",
        "MB a step",
        f"{what} after {length:,} {unit}",
        f"{unit} in {base}'s time",
    ]
    whole = f"whole {unit}" if every == 1 else f"multiples of {every}"
    note = (
        f"Ratio: median over rounds of a step's time over {base}'s in the same round, all side by side in one process. "
        f"{unit.capitalize()} in {base}'s time: {whole}, up to {length:,}; time within {100 * SAME:.0f} % counts as the same."
    )
    return Table(title, [*columns, f"{what} then"], lines, [note, *notes])


def within(length: int, ratio: float, every: int = 1) -> int:
    """Counts the epochs, or steps, that a method comes through in the baseline's time.

    Args:
        length: of a run.
        ratio: of its time to the baseline's.
        every: what the count is a multiple of, unless it is the whole run. Default: 1.

    >>> within(10, 1.25), within(10, 1.015), within(10, 0.8), within(1000, 1.1, 50)
    (8, 10, 10, 900)
    """
    reached = math.floor(length / ratio * (1 + SAME))
    return length if reached >= length else reached // every * every
