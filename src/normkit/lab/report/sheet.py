"""The report of an experiment: in the terminal, as Markdown and as one self-contained page."""

import base64
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from normkit.lab.experiment import Drawing, Experiment, Table
from normkit.lab.folder import FIGURES
from normkit.lab.record import write_bytes
from normkit.lab.report.page import moment, resource, setting, template
from normkit.lab.report.terminal import cell, is_text, print_table, print_text
from normkit.lab.say import counted


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
    words = experiment.words(config.get("scale", ""), config["seeds"], config["epochs"])
    threads = f"{counted(config['threads'], 'thread')} a run"
    return f"`{' '.join(words)}` on {hardware_of(here)}, {threads}, torch {here['torch']}, finished {moment(found['finished'])}."


def setup(experiment: Experiment) -> list[str]:
    """What was run, in paragraphs of Markdown: the docstring of the experiment's module without the first, its title."""
    text = (inspect.getdoc(sys.modules[experiment.run.__module__]) or "").replace("``", "`")
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)[1:]]


def hardware_of(here: Mapping[str, Any]) -> str:
    """Names what the runs were done on; in a record that lacks it, what the command was given on.

    >>> hardware_of({"devices": ["NVIDIA A100", "NVIDIA H200"]})
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
        hardware_of=hardware_of,
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
