"""Lines in the terminal as they are meant: paths, factories and patterns of a user are no markup and no emoji codes."""

from rich.console import Console
from rich.text import Text


def say(console: Console, text: str, style: str = "") -> None:
    """Prints text letter by letter, without breaking its lines.

    Args:
        console: where.
        text: what.
        style: of all of it. Default: plain.

    >>> say(Console(width=8), "runs/a[red]b:cancer:c")
    runs/a[red]b:cancer:c
    """
    console.print(Text(text, style=style), soft_wrap=True)
