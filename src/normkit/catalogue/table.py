"""The table of methods as Markdown, kept up to date in the pages that show it.

    python -m normkit.catalogue.table docs/methods.md

writes it between the lines ``<!-- methods -->`` (a line each) or ``<!-- comparison -->`` (with use cases, strengths and
weaknesses) and ``<!-- end -->`` of each file, and entries.json with them.
"""

import html
import re
import sys
from pathlib import Path

from normkit.catalogue.entry import write
from normkit.catalogue.methods import METHODS
from normkit.core.errors import NotationError

_BLOCK = re.compile(r"(<!-- (methods|comparison) -->\n).*?(<!-- end -->)", re.DOTALL)
_KINDS = {"input": "Data", "activation": "Activations", "weight": "Weights", "gradient": "Gradients"}


def methods_table() -> str:
    """Write every method in one line: name, word in recipes, what it normalizes over, paper."""
    lines = ["| method | word | normalized over | paper |", "|---|---|---|---|"]
    for kind, title in _KINDS.items():
        cards = [card for card in METHODS if card.kind == kind]
        if cards:
            lines.append(f"| **{title}** | | | |")
        for card in cards:
            who = card.paper.cite().split(",")[0]
            word = f"`{card.words}`" if card.words else ""
            lines.append(f"| {card.title} | {word} | {card.normalized_over} | [{who}]({card.paper.url}) |")
    return "\n".join(lines) + "\n"


def comparison_table() -> str:
    """Write every method with use cases, strengths, weaknesses, and the properties that the tests check, a table per kind."""
    head = ["method", "formula", "use cases", "strengths", "weaknesses", "properties", "invariant to"]
    lines = []
    for kind, title in _KINDS.items():
        lines += [f"### {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for card in METHODS:
            if card.kind != kind:
                continue
            flags = {"batch": card.batch_dependent, "running": card.running_state}
            flags |= {"two modes": not card.train_equals_eval, "folds": card.foldable}
            # A bar would end the cell: GitHub unescapes \\| within code, other readers of Markdown do not.
            formula = html.escape(card.formula, quote=False).replace("|", "&#124;")
            said = ", ".join(name for name, flag in flags.items() if flag), ", ".join(sorted(card.invariances))
            cells = [f"**{card.title}**<br>`{card.name}`", f"<code>{formula}</code>", card.use_cases]
            cells += [card.strengths, card.weaknesses, *said]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """Update the tables in a page's text."""
    if not _BLOCK.search(text):
        raise NotationError(
            "no table here: wanted a line <!-- methods --> or <!-- comparison --> and after it <!-- end -->"
        )
    tables = {"methods": methods_table, "comparison": comparison_table}
    return _BLOCK.sub(lambda match: match[1] + tables[match[2]]() + match[3], text)


if __name__ == "__main__":
    write(METHODS)
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_tables(path.read_text()))
