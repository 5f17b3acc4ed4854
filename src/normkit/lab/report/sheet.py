"""The report of an experiment: in the terminal, as Markdown and as one self-contained page."""

import base64
import inspect
import re
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Grid
from rich.text import Text

from normkit.lab.experiment import Drawing, Experiment, Table
from normkit.lab.folder import FIGURES
from normkit.lab.record import write_bytes
from normkit.lab.report.page import moment, resource, setting, template
from normkit.lab.say import counted
from normkit.lab.stats import ABSENT

LONG = 24  # characters, from which on a cell is read like a sentence
GAP = 2  # on each side of the line between two columns of a terminal
ENDLESS = 10**6


def cell(value: Any) -> str:
    """A cell of a table as text: up to four significant digits.

    >>> cell(0.123456), cell(12), cell(None)
    ('0.1235', '12', '–')
    """
    if value is None:
        return ABSENT
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_sheet(experiment: Experiment, found: Mapping[str, Any], console: Console) -> None:
    """Prints the tables and remarks of a result."""
    console.print(f"\n[bold]{experiment.title}[/bold]", highlight=False)
    console.print(f"{experiment.claim} ({experiment.paper.cite()})", highlight=False, markup=False)
    for table in experiment.tables(found["result"]):
        console.print(f"\n{table.title}", style="bold", highlight=False, markup=False)
        for places in side_by_side(table, console):
            console.print(_roomy(table, places, console))
        for note in table.notes:
            console.print(note, style="dim", highlight=False, markup=False)
    console.print()
    for remark in experiment.remarks(found["result"]):
        console.print(f"- {remark}", highlight=False, markup=False)


def side_by_side(table: Table, console: Console) -> list[list[int]]:
    """Parts the columns of a table so that each part fits a console, with the first column in each.

    Args:
        table: to print.
        console: on which.
    """
    parts: list[list[int]] = [[0]]
    for place in range(1, len(table.columns)):
        if len(parts[-1]) > 1 and not _fits(table, [*parts[-1], place], console):
            parts.append([0])
        parts[-1].append(place)
    return parts


def is_text(table: Table, place: int) -> bool:
    """Tells whether a column holds words rather than numbers: most of its cells are long or have letters and no digit.

    Args:
        table: which.
        place: of the column.
    """
    cells = [row[place] for row in table.rows if row[place] is not None]
    return 2 * sum(isinstance(value, str) and _wordy(value) for value in cells) > len(cells)


def _wordy(text: str) -> bool:
    return len(text) > LONG or (any(map(str.isalpha, text)) and not any(map(str.isdigit, text)))


def _fits(table: Table, places: Sequence[int], console: Console, room: int = 0) -> bool:
    # Measured without an edge, at which rich would stop.
    endless = console.options.update_width(ENDLESS)
    return Measurement.get(console, endless, _grid(table, places, console, room)).maximum <= console.width


def _roomy(table: Table, places: Sequence[int], console: Console) -> Grid:
    # Where headings must be broken, the widest columns give way first.
    room = bisect_left(range(console.width), True, key=lambda room: not _fits(table, places, console, room))
    return _grid(table, places, console, room - 1)


def _grid(table: Table, places: Sequence[int], console: Console, room: int) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place in places:
        justify = "right" if place and not is_text(table, place) else "left"
        width = max(_need(table, place, console), room)
        grid.add_column(Text(table.columns[place]), justify=justify, overflow="fold", max_width=width)
    for row in table.rows:
        grid.add_row(*(Text(cell(row[place])) for place in places))
    return grid


def _need(table: Table, place: int, console: Console) -> int:
    # A heading may be broken between words; what stands below it only where two columns would not fit.
    texts = [*(cell(row[place]) for row in table.rows), *table.columns[place].split()]
    return max(1, min(max(map(cell_len, texts), default=0), console.width // 2 - GAP))


def write_markdown(experiment: Experiment, found: Mapping[str, Any], figures: Sequence[Drawing], output: Path) -> Path:
    """Writes ``result.md``."""
    parts = [f"# {experiment.title}", f"{experiment.claim} ({experiment.paper.cite()})", facts(experiment, found)]
    if paragraphs := setup(experiment):
        parts += ["## What was run", *paragraphs]
    for table in experiment.tables(found["result"]):
        parts += [f"## {table.title}", _markdown(table), *table.notes]
    parts += ["## Remarks", "\n".join(f"- {remark}" for remark in experiment.remarks(found["result"]))]
    for drawing in figures:
        parts += [f"![{drawing.title}]({FIGURES}/{drawing.name}.png)", f"*{drawing.caption}*"]
    path = output / "result.md"
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())
    return path


def facts(experiment: Experiment, found: Mapping[str, Any]) -> str:
    """What was run, on what and when, in Markdown."""
    config, here = found["config"], found["environment"]
    words = experiment.words(config["scale"], config["seeds"], config["epochs"])
    threads = f"{counted(config['threads'], 'thread')} a run"
    return f"`{' '.join(words)}` on {devices(here)}, {threads}, torch {here['torch']}, finished {moment(found['finished'])}."


def setup(experiment: Experiment) -> list[str]:
    """What was run, in paragraphs of Markdown: the docstring of the experiment's module without the first, its title."""
    text = (inspect.getdoc(sys.modules[experiment.run.__module__]) or "").replace("``", "`")
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)[1:]]


def devices(here: Mapping[str, Any]) -> str:
    """Names what the runs were done on; in a record that lacks it, what the command was given on.

    >>> devices({"devices": ["NVIDIA A100", "NVIDIA H200"]})
    'NVIDIA A100, NVIDIA H200'
    """
    if here.get("devices"):
        return ", ".join(here["devices"])
    return here["device"] if here.get("device", "cpu") != "cpu" else f"{here['processor']}, {here['cores']} cores"


def write_sheet(experiment: Experiment, found: Mapping[str, Any], figures: Sequence[Drawing], output: Path) -> Path:
    """Writes ``report.html``, which needs nothing else and asks nothing of the network."""
    text = template("sheet.html").render(
        experiment=experiment,
        found=found,
        setup=setup(experiment),
        tables=experiment.tables(found["result"]),
        remarks=experiment.remarks(found["result"]),
        figures=[_figure(drawing, output) for drawing in figures],
        cell=cell,
        is_text=is_text,
        devices=devices,
        setting=setting,
        moment=moment,
        css=Markup(resource("page.css")),
    )
    page = output / "report.html"
    write_bytes(page, text.encode())
    return page


def _figure(drawing: Drawing, output: Path) -> dict[str, str]:
    path = f"{FIGURES}/{drawing.name}"
    data = base64.b64encode((output / f"{path}.png").read_bytes()).decode()
    return {"name": drawing.title, "caption": drawing.caption, "path": path, "data": f"data:image/png;base64,{data}"}


def _markdown(table: Table) -> str:
    head, *rows = [[cell(value).replace("|", "\\|") for value in row] for row in (table.columns, *table.rows)]
    rule = ["---" if not place or is_text(table, place) else "---:" for place in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
