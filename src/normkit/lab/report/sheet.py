"""The report of an experiment: in the terminal, as Markdown and as one self-contained page."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from normkit.lab.record import write_bytes
from normkit.lab.report.page import moment, resource, setting

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
    """Writes ``report.html``, which needs nothing else and asks nothing of the network."""
    pages = Environment(
        autoescape=True,
        loader=FunctionLoader(resource),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = pages.get_template("sheet.html").render(
        experiment=experiment,
        found=found,
        tables=experiment.tables(found["result"]),
        remarks=experiment.remarks(found["result"]),
        figures=[_picture(path, output) for path in figures if path.suffix == ".png"],
        cell=cell,
        setting=setting,
        moment=moment,
        css=Markup(resource("page.css")),
    )
    page = output / "report.html"
    write_bytes(page, text.encode())
    return page


def _picture(path: Path, output: Path) -> dict[str, str]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {
        "name": path.stem.replace("-", " "),
        "path": path.relative_to(output).with_suffix("").as_posix(),
        "data": f"data:image/png;base64,{data}",
    }


def _markdown(table: "Table") -> str:
    head, *rows = [[cell(value).replace("|", "\\|") for value in row] for row in (table.columns, *table.rows)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
