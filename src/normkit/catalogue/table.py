"""The table of methods as Markdown, kept up to date in the pages that show it.

    python -m normkit.catalogue.table README.md docs/methods.md

writes it between the lines ``<!-- methods -->`` (short) or ``<!-- comparison -->`` (with use cases, strengths and weaknesses)
and ``<!-- end -->`` of each file, and entries.json with them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from normkit.catalogue.entry import write
from normkit.catalogue.methods import METHODS
from normkit.core.errors import NotationError

_BLOCK = re.compile(r"(<!-- (methods|comparison) -->\n).*?(<!-- end -->)", re.DOTALL)
_KINDS = {"input": "Data", "activation": "Activations", "weight": "Weights", "gradient": "Gradients"}


def methods_table() -> str:
    """Write every method in one line: name, word in recipes, what it normalizes over, paper.

    >>> methods_table().splitlines()[0]
    '| method | word | normalized over | paper |'
    """
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
    """Write every method with use cases, strengths, weaknesses, and the properties that the tests check."""
    head = [
        "method",
        "formula",
        "use cases",
        "strengths",
        "weaknesses",
        "batch",
        "running",
        "train = eval",
        "folds",
        "invariant to",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for card in METHODS:
        flags = (card.batch_dependent, card.running_state, card.train_equals_eval, card.foldable)
        formula = card.formula.replace("|", "\\|")
        cells = [
            f"**{card.title}** `{card.name}`",
            f"`{formula}`",
            card.use_cases,
            card.strengths,
            card.weaknesses,
            *("yes" if flag else "no" for flag in flags),
            ", ".join(sorted(card.invariances)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """Update the tables in a page's text.

    Raises:
        NotationError: there is no place for a table in it.
    """
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
