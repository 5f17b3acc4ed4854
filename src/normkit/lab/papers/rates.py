"""Learning rates of a table's rows: each row tries several with the first seed, and takes its best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from normkit.lab.experiment import Bench, Table
from normkit.lab.sweep import Job
from normkit.lab.train import OK

Tried = Mapping[str, Any]  # a run: "rate", "status", "score", "loss", and "reached", which is how far it came


class Rated(Job, Protocol):
    """A job with a learning rate."""

    @property
    def rate(self) -> float:
        """Its rate."""
        ...


def tune(
    bench: Bench,
    learn: Callable[[Any, Path], Mapping[str, Any]],
    rows: Mapping[str, Sequence[Rated]],
    look: Callable[[Mapping[str, Any]], Tried],
) -> dict[str, dict[str, Any]]:
    """Tries the rates of each row, and chooses the best.

    Args:
        bench: where.
        learn: does a job.
        rows: by name, a job for each rate.
        look: what a job's result says on images or points that test nothing: "status", "score", "loss" and "reached".

    Returns:
        By name: ``sweep``, all that was tried, ``rate``, the chosen one, and ``edge``, whether a better one may lie beyond.
    """
    jobs = [(name, job) for name, tried in rows.items() for job in tried]
    sweeps: dict[str, list[Tried]] = {}
    for (name, job), found in zip(jobs, bench.sweep(learn, [job for _, job in jobs]), strict=True):
        sweeps.setdefault(name, []).append({"rate": job.rate, **look(found)})
    chosen = {}
    for name, sweep in sweeps.items():
        rate, rates = best(sweep), [run["rate"] for run in sweep]
        chosen[name] = {"sweep": sweep, "rate": rate, "edge": len(rates) > 1 and rate in (min(rates), max(rates))}
    return chosen


def best(sweep: Iterable[Tried]) -> float:
    """Chooses the rate with the highest score; of equals the lowest loss, then rate. Last come runs without a score.

    >>> best([{"rate": r, "status": "ok", "score": s, "loss": 1.0, "reached": 1} for r, s in ((0.1, 0.5), (1.0, 0.5))])
    0.1
    """

    def merit(run: Tried) -> tuple[float, ...]:
        if not scored(run):
            return (0, run["reached"], 0.0, -run["rate"])
        return (1, run["score"], -math.inf if run["loss"] is None else -run["loss"], -run["rate"])

    return max(sweep, key=merit)["rate"]


def scored(run: Tried) -> bool:
    """Whether a run came to its end with a score; a record holds None for one that is not finite."""
    return run["status"] == OK and run["score"] is not None


def rates_table(
    title: str,
    rows: Iterable[Mapping[str, Any]],
    note: str,
    *,
    form: str = ".1f",
    scale: float = 100.0,
    unit: str = "epoch",
) -> list[Table]:
    """The table of what each row reached at each rate; none where there was nothing to choose from.

    Args:
        title: of the table.
        rows: each with ``"name"`` and ``"sweep"``.
        note: what the numbers are.
        form: of the scores. Default: ``".1f"``.
        scale: by which they are multiplied. Default: 100.
        unit: of "reached". Default: ``"epoch"``.
    """
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
    """Says of which rows the chosen rate is the smallest or the largest that was tried.

    Args:
        rows: each with ``"name"`` and ``"edge"``.

    >>> edges([{"name": "BN", "edge": True}, {"name": "LN", "edge": False}])
    ['The chosen rate is at the edge of those tried, a better one may lie beyond: BN.']
    """
    names = ", ".join(row["name"] for row in rows if row["edge"])
    return [f"The chosen rate is at the edge of those tried, a better one may lie beyond: {names}."] if names else []


def _tried(run: Tried | None, form: str, scale: float, unit: str) -> str | None:
    if run is None:
        return None
    if run["status"] != OK:
        return f"diverged in {unit} {run['reached'] + 1:,}"
    return f"{scale * run['score']:{form}}" if scored(run) else None
