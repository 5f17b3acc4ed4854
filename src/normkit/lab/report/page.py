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
    """A paragraph.

    Args:
        text: plain, or markup of ours.
        look: ``"lead"`` or ``"note"``. Default: as prose.
    """

    text: str
    look: str = ""


@dataclass(frozen=True)
class Points:
    """A list.

    Args:
        items: plain text.
        look: ``"cautions"``, small; ``"code"``. Default: as prose.
        summary: of a list that is folded up. Default: none, it lies open.
    """

    items: Sequence[str]
    look: str = "said"
    summary: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure to point at and to zoom into.

    Args:
        picture: what it shows; its panels stand side by side.
        captions: of each panel.
    """

    picture: Picture
    captions: Sequence[str]


Block = Text | Points | Chart | Table | Drawing


@dataclass(frozen=True)
class Section:
    """A section.

    Args:
        title: above it.
        blocks: from top to bottom.
    """

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Account:
    """What the page of an experiment says of its result.

    Args:
        sections: from top to bottom.
        looks: of recipes, by name. Default: nothing has a colour.
    """

    sections: Sequence[Section]
    looks: Mapping[str, Style] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        kind: the command, above the title.
        title: of the page.
        facts: below the title, a sentence or two.
        account: what it says.
        command: that makes the records again.
        records: settings and environment, by title.
    """

    kind: str
    title: str
    facts: str
    account: Account
    command: str
    records: Mapping[str, Mapping[str, Any]]


def write(page: Page, output: Path) -> Path:
    """Writes ``report.html``, which holds all it needs and asks nothing of the network.

    Args:
        page: what it says.
        output: the folder of the records, with the figures that the page shows.

    Returns:
        The file written. The same records give the same bytes.

    Raises:
        RecordError: the folder is not writable.
    """
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
    charts = [block for section in page.account.sections for block in section.blocks if isinstance(block, Chart)]
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
