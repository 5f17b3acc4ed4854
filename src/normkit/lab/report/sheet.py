"""The report of an experiment: in the terminal, as Markdown, and as a self-contained page that works offline."""

import base64
import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from normkit.lab.experiment import Drawing, Experiment
from normkit.lab.folder import FIGURES
from normkit.lab.record import write_text
from normkit.lab.report.terminal import COLOURS, cell, is_text, markdown, print_table, print_text
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
        image=lambda name: _image(output / FIGURES / name),
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


def _image(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
