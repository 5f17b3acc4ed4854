"""The report of an experiment: in the terminal, as Markdown and as one self-contained page."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from normkit.lab.record import write_bytes

if TYPE_CHECKING:
    from normkit.lab.experiment import Experiment, Table

ABSENT = "–"


def cell(value: Any) -> str:
    """A cell of a table as text: up to four significant digits.

    >>> cell(0.123456), cell(12), cell(None)
    ('0.1235', '12', '–')
    """
    if value is None:
        return ABSENT
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_sheet(experiment: "Experiment", found: Mapping[str, Any], console: Console) -> None:
    """Prints the tables and remarks of a result."""
    console.print(f"\n[bold]{experiment.title}[/bold]", highlight=False)
    console.print(f"{experiment.claim} ({experiment.paper.cite()})", highlight=False, markup=False)
    for table in experiment.tables(found["result"]):
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(table.columns):
            grid.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*map(cell, row))
        console.print(grid)
        for note in table.notes:
            console.print(note, style="dim", highlight=False, markup=False)
    console.print()
    for remark in experiment.remarks(found["result"]):
        console.print(f"- {remark}", highlight=False, markup=False)


def write_markdown(experiment: "Experiment", found: Mapping[str, Any], figures: Sequence[Path], output: Path) -> Path:
    """Writes ``result.md``."""
    parts = [f"# {experiment.title}", f"{experiment.claim} ({experiment.paper.cite()})"]
    for table in experiment.tables(found["result"]):
        parts += [f"## {table.title}", _markdown(table), *table.notes]
    parts += ["## Remarks", "\n".join(f"- {remark}" for remark in experiment.remarks(found["result"]))]
    parts += [f"![{path.stem}]({path.relative_to(output).as_posix()})" for path in figures if path.suffix == ".png"]
    path = output / "result.md"
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())
    return path


def write_sheet(experiment: "Experiment", found: Mapping[str, Any], figures: Sequence[Path], output: Path) -> Path:
    """Writes ``report.html``, which needs nothing else."""
    parts = [f"<h1>{html.escape(experiment.title)}</h1>", f"<p>{html.escape(experiment.claim)}</p>"]
    for table in experiment.tables(found["result"]):
        head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row) + "</tr>" for row in table.rows
        )
        parts += [f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>"]
        parts += [f"<p>{html.escape(note)}</p>" for note in table.notes]
    parts += [f"<li>{html.escape(remark)}</li>" for remark in experiment.remarks(found["result"])]
    for path in figures:
        if path.suffix == ".png":
            parts.append(f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">')
    page = output / "report.html"
    write_bytes(page, f'<!doctype html><meta charset="utf-8">{"".join(parts)}'.encode())
    return page


def _markdown(table: "Table") -> str:
    head, *rows = [[cell(value).replace("|", "\\|") for value in row] for row in (table.columns, *table.rows)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
