"""The report of an experiment: in the terminal, as Markdown and as a page."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from normkit.lab.experiment import Drawing, Experiment
from normkit.lab.folder import FIGURES
from normkit.lab.record import write_text
from normkit.lab.report.page import Account, Page, Points, Text, moment, write
from normkit.lab.report.terminal import markdown, print_table, print_text
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
    config = found["config"]
    size = f"{config['scale'].capitalize()} scale" if config.get("scale") else f"{config['epochs']} epochs"
    page = Page(
        kind=" ".join(["normkit", experiment.kind, *([] if experiment.name == experiment.kind else [experiment.name])]),
        title=experiment.title,
        facts=f"{size}, {counted(len(config['seeds']), 'seed')}, on {hardware_of(found['environment'])}. "
        f"Finished {moment(found['finished'])}.",
        account=experiment.interactive(found["result"])
        if experiment.interactive
        else _account(experiment, found, figures),
        command=found.get("command") or "",
        records={"Settings": config, "Environment": found["environment"]},
    )
    return write(page, output)


def _account(experiment: Experiment, found: Mapping[str, Any], figures: Sequence[Drawing]) -> Account:
    said, paper, source = Markup('{} ({}), <cite>{}</cite>, <a href="{}">{}</a>'), experiment.paper, []
    if paper is not None:
        source = [Text(said.format(paper.authors, paper.year, paper.title, paper.url, paper.url), "note")]
    return Account(
        {
            "What the source says": [Text(experiment.claim, "lead"), *source],
            "What was run": [Text(paragraph.replace("`", "")) for paragraph in setup(experiment)],
            "What was seen": [Points(experiment.remarks(found["result"]))],
            "Numbers": experiment.tables(found["result"]),
            "Figures": figures,
        }
    )
