"""The catalogue in the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normkit.catalogue.entry import NAMESPACES, entries, entry
from normkit.core.errors import OptionError, closest


def list_table(console: Console, kind: str | None = None, **claims: bool | None) -> None:
    """Print methods, one line each, of one kind and with these claims (``foldable=True``), None for any."""
    kinds = list(dict.fromkeys(known.kind for known in entries()))
    if kind is not None and kind not in kinds:
        raise OptionError(f"no methods of {kind!r}; wanted one of {', '.join(kinds)}{closest(kind, kinds)}")
    wanted = {field: value for field, value in claims.items() if value is not None}
    rows = [known for known in entries() if kind in (None, known.kind)]
    rows = [known for known in rows if all(getattr(known, field) == value for field, value in wanted.items())]
    table = Table(title=f"{len(rows)} methods", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("method", "in recipes", "normalized over", "year"):
        table.add_column(column, no_wrap=column != "normalized over")
    for each in dict.fromkeys(known.kind for known in rows):
        table.add_row(f"[dim]of {each}s[/dim]")
        for known in rows:
            if known.kind == each:
                table.add_row(known.name, known.words, known.normalized_over, str(known.year))
    console.print(table)
    said = "normkit show METHOD prints one. Recipes such as gn:8+ws+e are made of the words; what is in capitals may be left out."
    console.print(said, style="dim", highlight=False)


def show_page(name: str, console: Console) -> None:
    """Print one method's entry and the picture of its support set."""
    method = entry(name)
    console.print(
        f"[bold]{escape(method.title)}[/bold]  ({method.name}"
        + (f", {method.word} in recipes)" if method.word else ")")
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column()
    for label, text in (
        ("normalized over", method.normalized_over),
        ("formula", method.formula),
        ("paper", method.citation),
        ("use cases", method.use_cases),
        ("strengths", method.strengths),
        ("weaknesses", method.weaknesses),
        ("depends on the batch", "yes, in training" if method.batch_dependent else "no"),
        ("running statistics", "yes" if method.running_state else "no"),
        ("training = inference", "yes" if method.train_equals_eval else "no"),
        ("folds into weights", "yes" if method.foldable else "no"),
        ("invariant to", method.invariances or "none of those in the table"),
        ("in Python", f"{NAMESPACES[method.kind]}.{method.module}, normkit.functional.{method.functional}"),
    ):
        grid.add_row(label, escape(text))
    console.print(grid)
    if method.support is not None and method.picture is not None:
        console.print(f"\n{escape(method.support)}", highlight=False)
        console.print(method.picture, highlight=False)
        console.print("■ shares the statistic of ◆", style="dim")
