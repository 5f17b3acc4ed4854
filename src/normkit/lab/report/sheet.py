"""The report of an experiment: in the terminal, as Markdown, and as a self-contained page that works offline."""

import base64
import inspect
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Grid
from rich.text import Text

from normkit.lab.experiment import Drawing, Experiment, Table
from normkit.lab.folder import FIGURES
from normkit.lab.record import write_text
from normkit.lab.say import counted, visible
from normkit.lab.stats import ABSENT, BETTER, WORSE

COLOURS = {BETTER: "green", WORSE: "red", "diverged": "red"}
ASCII = str.maketrans({"\u2212": "-", ABSENT: "-", "\u00d7": "x", "±": "+-", "†": "*", "²": "2", "κ": "k", "λ": "l"})
LONG = 24  # characters, from which on a cell is read like a sentence
GAP = 2  # on each side of the line between two columns of a terminal
ENDLESS = 10**6


def cell(value: Any) -> str:
    """A cell of a table as text: up to four significant digits."""
    return ABSENT if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def spelled(text: str, console: Console, style: str = "") -> Text:
    """Text in the letters that the terminal can write; some pipes and Windows consoles have no UTF-8."""
    text = visible(text)
    return Text(text.translate(ASCII) if console.options.ascii_only else text, style=style, overflow="fold")


def print_text(text: str, console: Console, style: str = "") -> None:
    """Prints a paragraph, broken between words."""
    console.print(spelled(text, console, style))


def markdown(table: Table) -> str:
    """A table in Markdown, without title and notes."""
    head, *rows = [
        [cell(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in (table.columns, *table.rows)
    ]
    rule = ["---" if not place or is_text(table, place) else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows])


def print_table(table: Table, console: Console) -> None:
    """Prints a table with its title and notes."""
    print_text(f"\n{table.title}", console, "bold")
    for places in side_by_side(table, console):
        # Where headings must be broken, the widest columns give way first.
        room = bisect_left(range(console.width), True, key=lambda room: not _fits(table, places, console, room))
        console.print(_grid(table, places, console, room - 1))
    for note in table.notes:
        print_text(note, console, "dim")


def side_by_side(table: Table, console: Console) -> list[list[int]]:
    """Parts the columns of a table so that each part fits a console, with the first column in each."""
    parts: list[list[int]] = [[0]]
    for place in range(1, len(table.columns)):
        if len(parts[-1]) > 1 and not _fits(table, [*parts[-1], place], console):
            parts.append([0])
        parts[-1].append(place)
    return parts


def is_text(table: Table, place: int) -> bool:
    """Tells whether a column holds words: most cells are long, have three words or more, or have letters and no digit."""
    cells = [row[place] for row in table.rows if row[place] is not None]
    return 2 * sum(isinstance(value, str) and _wordy(value) for value in cells) > len(cells)


def _wordy(text: str) -> bool:
    letters = any(map(str.isalpha, text)) and not any(map(str.isdigit, text))
    return letters or len(text) > LONG or sum(word.strip(",:").isalpha() for word in text.split()) > 2


def _fits(table: Table, places: Sequence[int], console: Console, room: int = 0) -> bool:
    # Measured without an edge, at which rich would stop.
    endless = console.options.update_width(ENDLESS)
    return Measurement.get(console, endless, _grid(table, places, console, room)).maximum <= console.width


def _grid(table: Table, places: Sequence[int], console: Console, room: int) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place in places:
        justify = "right" if place and not is_text(table, place) else "left"
        width = max(_need(table, place, console), room)
        heading = spelled(table.columns[place], console, "bold")
        grid.add_column(heading, justify=justify, overflow="fold", max_width=width)
    for row in table.rows:
        texts = [cell(row[place]) for place in places]
        grid.add_row(*(spelled(text, console, COLOURS.get(text, "") if k else "bold") for k, text in enumerate(texts)))
    return grid


def _need(table: Table, place: int, console: Console) -> int:
    # A heading may be broken between words; what stands below it only where two columns would not fit.
    texts = [line for row in table.rows for line in cell(row[place]).split("\n")] + table.columns[place].split()
    return max(1, min(max(map(cell_len, texts), default=0), console.width // 2 - GAP))


def print_sheet(experiment: Experiment, found: Mapping[str, Any], console: Console) -> None:
    """Prints the tables and remarks of a result."""
    print_text(f"\n{experiment.title}", console, "bold")
    print_text(experiment.sentence, console)
    for table in experiment.tables(found["result"]):
        print_table(table, console)
    console.print()
    for remark in experiment.remarks(found["result"]):
        print_text(f"- {remark}", console)


def write_markdown(experiment: Experiment, found: Mapping[str, Any], figures: Sequence[Drawing], output: Path) -> Path:
    """Writes ``result.md``."""
    parts = [f"# {experiment.title}", experiment.sentence, facts(experiment, found)]
    if paragraphs := setup(experiment):
        parts += ["## What was run", *paragraphs]
    for table in experiment.tables(found["result"]):
        parts += [f"## {table.title}", markdown(table), *table.notes]
    parts += ["## Remarks", "\n".join(f"- {remark}" for remark in experiment.remarks(found["result"]))]
    for drawing in figures:
        parts += [f"![{drawing.title}]({FIGURES}/{drawing.file})", f"*{drawing.caption}*"]
    path = output / "result.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def facts(experiment: Experiment, found: Mapping[str, Any]) -> str:
    """What was run, on what and when, in Markdown."""
    config, here = found["config"], found["environment"]
    words = experiment.words(config.get("scale", ""), config["seeds"], config["epochs"])
    threads = f"{counted(config['threads'], 'thread')} per run"
    return f"`{' '.join(words)}` on {hardware_of(here)}, {threads}, torch {here['torch']}, finished {moment(found['finished'])}."


def setup(experiment: Experiment) -> list[str]:
    """What was run, in paragraphs of Markdown."""
    text = experiment.about or (inspect.getdoc(sys.modules[experiment.run.__module__]) or "").partition("\n\n")[2]
    return [
        " ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip().replace("``", "`")) if paragraph
    ]


def hardware_of(here: Mapping[str, Any]) -> str:
    """Names what the runs were done on; in a record that lacks it, what the command was given on."""
    if here.get("devices"):
        return ", ".join(here["devices"])
    return here["device"] if here.get("device", "cpu") != "cpu" else f"{here['processor']}, {here['cores']} cores"


def write_sheet(experiment: Experiment, found: Mapping[str, Any], figures: Sequence[Drawing], output: Path) -> Path:
    """Writes ``report.html``, which holds all it needs; the same records give the same bytes."""
    config, result, path = found["config"], found["result"], output / "report.html"
    size = f"{config['scale'].capitalize()} scale" if config.get("scale") else f"{config['epochs']} epochs"
    facts = f"{size}, {counted(len(config['seeds']), 'seed')}, on {hardware_of(found['environment'])}"
    given = {"looks": {}, "pictures": {}} if experiment.interactive is None else experiment.interactive(result)
    pages = Environment(
        autoescape=True,
        loader=FunctionLoader(_resource),
        undefined=StrictUndefined,  # what the page asks for and is not given is an error
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = pages.get_template("comparison.html" if experiment.interactive else "experiment.html").render(
        {"names": list(given["looks"]), **given},
        experiment=experiment,
        result=result,
        figures=figures,
        setup=setup(experiment),
        kind=" ".join(dict.fromkeys(("normkit", experiment.kind, experiment.name))),
        title=experiment.title,
        facts=f"{facts}. Finished {moment(found['finished'])}.",
        command=found.get("command") or "",
        records={"Settings": config, "Environment": found["environment"]},
        data=_embedded(given["looks"], given["pictures"].values()) if given["pictures"] else None,
        colours=COLOURS,
        cell=cell,
        counted=counted,
        is_text=is_text,
        image=lambda name: base64.b64encode((output / FIGURES / name).read_bytes()).decode(),
        setting=setting,
        css=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
    )
    write_text(path, page)
    return path


def _embedded(looks: Mapping[str, Any], pictures: Iterable[Any]) -> Markup:
    recipes = [{"name": name, "marker": look.marker, "line": look.line} for name, look in looks.items()]
    groups = [[panel.place for panel in picture.panels] for picture in pictures]
    panels = {panel.place: panel for picture in pictures for panel in picture.panels}
    text = json.dumps(
        {"recipes": recipes, "groups": groups, "panels": panels},
        separators=(",", ":"),
        default=lambda value: list(value) if isinstance(value, range) else vars(value),
    )
    # JSON that cannot end the script element that holds it.
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def moment(text: Any) -> str:
    """A time as a person reads it, or as it was recorded where it is not one."""
    try:
        return f"{datetime.fromisoformat(str(text)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return str(text)


def setting(value: Any) -> str:
    """A setting or a fact of the environment as text."""
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(entry)}" for key, entry in value.items())
    return "none" if value is None else str(value)


def _resource(name: str) -> str:
    return files("normkit.lab.report").joinpath(name).read_text(encoding="utf-8")
