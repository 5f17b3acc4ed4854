"""How every script here times, and writes its section of RESULTS.md and the record beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from normkit.core.errors import closest
from normkit.engine.library import description
from normkit.lab.bench.race import quartile
from normkit.lab.bench.report import replace_section
from normkit.lab.devices import cores, processor
from normkit.lab.record import read_json, write_json
from normkit.lab.stats import median_interval

PAGE = Path("benchmarks/RESULTS.md")


def how(command: str) -> str:
    """The command, the day and the machine, which every section begins with."""
    threads = torch.get_num_threads()
    return (
        f"`{command}`, {date.today()}, {processor()}, {cores()} cores, torch {torch.__version__}, {threads} "
        f"thread{'s' * (threads > 1)}, native kernels: {description()}."
    )


def write(page: Path | None, title: str, text: str, rows: Any) -> None:
    """Replaces the section, and puts what it was made from into a record named after it."""
    if page is not None:
        replace_section(page, title, text)
        write_json(beside(page, title), rows)


def beside(page: Path, title: str) -> Path:
    """The record of a section."""
    return page.with_name(title.lower().replace(" ", "_") + ".json")


def earlier(page: Path | None, title: str) -> dict[str, Any]:
    """What the record of a section holds: rows by name."""
    path = None if page is None else beside(page, title)
    return read_json(path) if path is not None and path.exists() else {}


def only(names: str, known: Mapping[str, Any]) -> list[str]:
    """The names that are asked for, separated by commas; all without any."""
    asked = names.split(",") if names else list(known)
    for name in asked:
        if name not in known:
            raise SystemExit(f"no network {name!r} here; wanted some of {', '.join(known)}{closest(name, known)}")
    return asked


def ratio(over: list[float], under: list[float]) -> list[float | None]:
    """A ratio of first quartiles, and the interval of 95% of the median ratio of the pairs."""
    between = median_interval([a / b for a, b in zip(over, under, strict=True)]) or (None, None)
    return [quartile(over) / quartile(under), *between]


def said(found: list[float | None]) -> str:
    """A ratio and its interval as text."""
    middle, *between = found
    return f"{middle:.2f}" + (" ({:.2f}-{:.2f})".format(*between) if any(between) else "")


def alternate(
    one: Callable[[], object], other: Callable[[], object], rounds: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of two calls in turns, in alternating order."""
    for call in (one, other) * 3:
        call()
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(rounds):
        for place in (0, 1) if turn % 2 else (1, 0):
            start = clock()
            (one, other)[place]()
            seconds[place].append(clock() - start)
    return seconds


def table(columns: tuple[str, ...], rows: list[list[str]], text: int = 1) -> str:
    """A Markdown table, whose first columns are text and whose others are numbers."""
    rule = "|" + "---|" * text + "--:|" * (len(columns) - text)
    return "\n".join([f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])
