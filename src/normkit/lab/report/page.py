"""The report of a comparison as one self-contained page that works offline."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from normkit.lab.record import write_bytes
from normkit.lab.report import wording
from normkit.lab.report.charts import charts
from normkit.lab.report.comparison import Comparison, at, finite
from normkit.lab.report.palette import styles


def write_page(found: Mapping[str, Any], output: Path) -> Path:
    """Writes ``report.html`` of a comparison.

    The page holds all it needs, plotly.js included, and asks nothing of the network.

    Args:
        found: what ``result.json`` holds.
        output: the folder.

    Returns:
        The file written. The same record and the same plotly give the same bytes.

    Raises:
        RecordError: the folder cannot be written.
    """
    path = output / "report.html"
    write_bytes(path, render(found).encode())
    return path


def render(found: Mapping[str, Any]) -> str:
    """The page's HTML."""
    from plotly.offline import get_plotlyjs

    comparison = Comparison.of(found["result"])
    result = {**found, "title": found["experiment"]["title"], **found["result"]}

    def number(path: str, kind: str) -> Markup:
        """A number with its full value and its place in result.json behind it."""
        value = finite(at(result, path))
        text = wording.number(value, kind)
        if value is None:
            return Markup('<span class="absent" title="not recorded">{}</span>').format(text)
        return Markup('<data value="{}" title="{} = {}">{}</data>').format(repr(value), path, repr(value), text)

    return template("page.html").render(
        result=result,
        recipes=list(enumerate(result["recipes"])),
        seeds=sorted({str(run.get("seed")) for recipe in result["recipes"] for run in recipe["runs"]}, key=natural),
        swept=sorted({str(entry.get("seed")) for r in result["recipes"] for entry in r["sweep"]}, key=natural),
        styles=styles(comparison.names, result["baseline"]),
        findings=wording.findings(result),
        cautions=wording.cautions(result),
        level=wording.level(at(result["recipes"][-1], "paired")),
        score=wording.score_name(result),
        number=number,
        at=lambda path: at(result, path),
        judge=wording.judge,
        verdict=wording.verdict,
        listing=wording.listing,
        setting=setting,
        link=link,
        moment=moment,
        over_seeds=wording.over_seeds,
        plain=wording.number,
        data=embedded(charts(comparison)),
        css=Markup(resource("page.css")),
        script=Markup(resource("page.js")),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def template(name: str) -> Template:
    """A page of this package to be filled in; what it asks for and is not given is an error."""
    pages = Environment(
        autoescape=True,
        loader=FunctionLoader(resource),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(name)


def resource(name: str) -> str:
    """A file of this package."""
    return files("normkit.lab.report").joinpath(name).read_text(encoding="utf-8")


def embedded(value: Any) -> Markup:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def link(folder: str) -> str:
    """The address of a run's folder relative to the page."""
    return "./" + quote(folder, safe="/+@:,=")


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


def natural(text: str) -> tuple[int, str]:
    """The order of seeds: as numbers."""
    return len(text), text
