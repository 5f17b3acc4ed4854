"""Puts the catalogue's data into the page of the atlas, and the table of other libraries' names into its page."""

import json
from pathlib import Path
from typing import Any

from normkit.catalogue.methods import METHODS

_ELSEWHERE = Path(__file__).with_name("elsewhere.json")
_LIBRARIES = {"torch": "torch", "timm": "timm", "apex": "apex", "flax": "flax.nnx", "keras": "Keras"}


def elsewhere() -> dict[str, dict[str, str]]:
    """For each method a line that makes it, and its name in other libraries."""
    return json.loads(_ELSEWHERE.read_text(encoding="utf-8"))


def data() -> list[dict[str, Any]]:
    """What the atlas shows of each method that has one support set."""
    others = elsewhere()
    rows = []
    for card in METHODS:
        if card.rule is None:
            continue
        support, compensation, memory = card.rule.support, card.rule.compensation, card.rule.memory
        rows.append(
            {
                "name": card.name,
                "title": card.title,
                "kind": card.kind,
                "axes": support.axes,
                "over": support.over,
                "sizes": dict(support.sizes),
                "formula": card.rule.formula(),
                "parameters": None if compensation is None else compensation.per,
                "running": None if memory is None else memory.per,
                "over_words": card.normalized_over,
                "paper": card.paper.cite(),
                "url": card.paper.url,
                "word": card.words,
                **others[card.name],
            }
        )
    return rows


def table() -> str:
    """One row per method that another library has."""
    lines = [f"| normkit | {' | '.join(_LIBRARIES.values())} |", "|" + "---|" * (len(_LIBRARIES) + 1)]
    for names in elsewhere().values():
        if any(library in names for library in _LIBRARIES):
            cells = (
                names.get(name, "").replace(".", ".<wbr>").replace("(", "(<wbr>") for name in ("line", *_LIBRARIES)
            )
            lines.append(f"| {' | '.join(f'<code>{cell}</code>' if cell else '' for cell in cells)} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    # A </script> in the data would end it.
    text = json.dumps(data(), ensure_ascii=False).replace("</", "<\\/")
    island = f'<script type="application/json" id="atlas-data">{text}</script>'
    return markdown.replace("<!-- atlas -->", island).replace("<!-- elsewhere -->", table())
