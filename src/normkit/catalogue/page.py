"""What the terminal shows of the catalogue."""

from __future__ import annotations

from typing import get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normkit.catalogue.diagram import draw_text
from normkit.catalogue.methods import METHODS, method
from normkit.core.card import Kind
from normkit.core.errors import OptionError


def list_table(console: Console, kind: str | None = None, **claims: bool | None) -> None:
    """Print methods, one line each.

    Args:
        console: to print on.
        kind: ``"input"``, ``"activation"``, ``"weight"`` or ``"gradient"``; None for all.
        **claims: values that fields of the card must have, e.g. ``foldable=True``; None for any.

    Raises:
        OptionError: there is no such kind.
    """
    kinds = get_args(Kind)
    if kind is not None and kind not in kinds:
        raise OptionError(f"no methods of {kind!r}; wanted one of {', '.join(kinds)}")
    wanted = {field: value for field, value in claims.items() if value is not None}
    cards = [card for card in METHODS if kind in (None, card.kind)]
    cards = [card for card in cards if all(getattr(card, field) == value for field, value in wanted.items())]
    table = Table(title=f"{len(cards)} methods", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("method", "word", "of", "normalized over", "year"):
        table.add_column(column, no_wrap=column != "normalized over")
    for card in cards:
        table.add_row(card.name, card.word, card.kind, card.normalized_over, str(card.paper.year))
    console.print(table)
    console.print("normkit show METHOD prints one; its word stands for it in recipes such as bn+e", style="dim")


def show_page(name: str, console: Console) -> None:
    """Print one method's card and the picture of its support set.

    Args:
        name: the method's name or word.
        console: to print on.

    Raises:
        NotationError: no such method.
    """
    card = method(name)
    console.print(
        f"[bold]{escape(card.title)}[/bold]  ({card.name}" + (f", {card.word} in recipes)" if card.word else ")")
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column()
    for label, text in (
        ("normalized over", card.normalized_over),
        ("formula", card.formula),
        ("paper", card.paper.cite()),
        ("use cases", card.use_cases),
        ("strengths", card.strengths),
        ("weaknesses", card.weaknesses),
        ("depends on the batch", "yes, in training" if card.batch_dependent else "no"),
        ("running statistics", "yes" if card.running_state else "no"),
        ("training = inference", "yes" if card.train_equals_eval else "no"),
        ("folds into weights", "yes" if card.foldable else "no"),
        ("invariant to", ", ".join(sorted(card.invariances)) or "none of those in the table"),
        ("in Python", f"normkit.{card.module.__name__}, normkit.{card.functional.__name__}"),
    ):
        grid.add_row(label, escape(text))
    console.print(grid)
    if card.rule is not None:
        console.print(f"\n{escape(str(card.rule.support))}", highlight=False)
        console.print(draw_text(card.rule.support), highlight=False)
        console.print("■ shares the statistic of ◆", style="dim")
