"""The page of a report: one self-contained file that works offline, from sections of text, tables and figures."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from normkit.lab.experiment import Drawing, Table
from normkit.lab.folder import FIGURES
from normkit.lab.record import write_text
from normkit.lab.report.palette import Style
from normkit.lab.report.series import Picture
from normkit.lab.report.terminal import COLOURS, cell, is_text


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str  # plain, or markup of ours
    look: str = ""  # "lead" or "note"


@dataclass(frozen=True)
class Points:
    """A list."""

    items: Sequence[str]  # plain text
    look: str = "said"  # "cautions", small; "code"
    summary: str = ""  # of a list that is folded up


@dataclass(frozen=True)
class Chart:
    """A figure to point at and to zoom into."""

    picture: Picture  # what it shows; its panels stand side by side
    captions: Sequence[str]  # of each panel


Block = Text | Points | Chart | Table | Drawing


@dataclass(frozen=True)
class Account:
    """What the page of an experiment says of its result."""

    sections: Mapping[str, Sequence[Block]]  # by title; one without blocks is left out
    looks: Mapping[str, Style] = field(default_factory=dict)  # of recipes, by name


@dataclass(frozen=True)
class Page:
    """A page."""

    kind: str  # the command, above the title
    title: str
    facts: str  # below the title, a sentence or two
    account: Account
    command: str  # that makes the records again
    records: Mapping[str, Mapping[str, Any]]  # settings and environment, by title


def write(page: Page, output: Path) -> Path:
    """Writes ``report.html``, which holds all it needs; the same records give the same bytes."""
    path = output / "report.html"
    write_text(path, render(page, output))
    return path


def render(page: Page, output: Path) -> str:
    """The page's HTML; static figures are read from `output`."""
    pages = Environment(
        autoescape=True,
        loader=FunctionLoader(_resource),
        undefined=StrictUndefined,  # what the page asks for and is not given is an error
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["kind"] = lambda block: type(block).__name__
    charts = [each for blocks in page.account.sections.values() for each in blocks if isinstance(each, Chart)]
    return pages.get_template("page.html").render(
        page=page,
        account=page.account,
        names=list(page.account.looks),
        data=_embedded(page, charts) if charts else None,
        colours=COLOURS,
        cell=cell,
        is_text=is_text,
        image=lambda name: _image(output / FIGURES / name),
        setting=setting,
        css=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
    )


def _resource(name: str) -> str:
    return files("normkit.lab.report").joinpath(name).read_text(encoding="utf-8")


def _image(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _embedded(page: Page, charts: Sequence[Chart]) -> Markup:
    recipes = [{"name": name, "marker": look.marker, "line": look.line} for name, look in page.account.looks.items()]
    panels = {panel.place: panel for chart in charts for panel in chart.picture.panels}
    groups = [[panel.place for panel in chart.picture.panels] for chart in charts]
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
