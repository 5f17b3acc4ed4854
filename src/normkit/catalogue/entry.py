"""The catalogue as text: made from the cards, stored in entries.json, and read without torch.

The command line lists, shows and cites methods from here, so that it answers at once. ``normkit.catalogue.table`` writes the file
whenever it writes the tables of the pages.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normkit.core.errors import NotationError

if TYPE_CHECKING:
    from normkit.core.card import Card

_FILE = Path(__file__).with_name("entries.json")

# The namespace of each kind of method in Python; its function is in normkit.functional.
NAMESPACES = {"input": "normkit.preprocessing", "activation": "normkit"}
NAMESPACES |= {"weight": "normkit.weights", "gradient": "normkit.gradients"}


@dataclass(frozen=True)
class Entry:
    """A card as text; fields that a card has too hold the same as there."""

    name: str
    title: str
    kind: str
    word: str
    words: str
    normalized_over: str
    formula: str
    use_cases: str
    strengths: str
    weaknesses: str
    year: int
    citation: str
    bibtex: str
    batch_dependent: bool
    running_state: bool
    train_equals_eval: bool
    foldable: bool
    invariances: str
    module: str
    functional: str
    support: str | None
    picture: str | None


def describe(card: Card) -> Entry:
    """Make the entry of a card."""
    from normkit.catalogue.diagram import draw_text  # needs torch, and so only where an entry is made

    support = None if card.rule is None else card.rule.support
    shared = {field.name: getattr(card, field.name) for field in fields(Entry) if hasattr(card, field.name)}
    told: dict[str, Any] = {"module": card.module.__name__, "functional": card.functional.__name__}
    told |= {"invariances": ", ".join(sorted(card.invariances))}
    told |= {"support": support and str(support), "picture": support and draw_text(support)}
    told |= {"year": card.paper.year, "citation": card.paper.cite(), "bibtex": card.paper.bibtex()}
    return Entry(**shared | told)


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every method, in the order of the catalogue."""
    return tuple(Entry(**each) for each in json.loads(_FILE.read_text(encoding="utf-8")))


def entry(name: str) -> Entry:
    """The entry of a method, by its name, its word in recipes or its class."""
    found = find(name, {known.name: spellings(known.name, known.word, known.module) for known in entries()})
    return next(known for known in entries() if known.name == found)


def text(cards: Iterable[Card]) -> str:
    """The contents of entries.json for these cards."""
    return json.dumps([asdict(describe(card)) for card in cards], indent=1, ensure_ascii=False) + "\n"


def write(cards: Iterable[Card]) -> None:
    """Write entries.json."""
    _FILE.write_text(text(cards), encoding="utf-8")
    entries.cache_clear()


def spellings(name: str, word: str, module: str) -> set[str]:
    """The spellings by which a method may be requested."""
    return {spelling.lower() for spelling in (name, word, name.replace("_", ""), module) if spelling}


def find(name: str, known: Mapping[str, set[str]]) -> str:
    """Find the name of the method that is meant."""
    wanted = name.strip().lower().replace("-", "_").replace(" ", "_")
    for method, words in known.items():
        if wanted in words:
            return method
    inside = [method for method, words in known.items() if len(wanted) > 2 and any(wanted in word for word in words)]
    by_word: dict[str, str] = {}
    for method, words in known.items():
        by_word |= dict.fromkeys(words - by_word.keys(), method)  # of several methods in one class, the first
    alike = [by_word[word] for word in get_close_matches(wanted, by_word, n=3)]
    close = list(dict.fromkeys(inside or alike))[:3]
    hint = f"did you mean {', '.join([*close[:-2], ' or '.join(close[-2:])])}? " if close else ""
    raise NotationError(f"no method {name!r}; {hint}those that exist: {', '.join(known)}")
