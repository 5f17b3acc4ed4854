"""Lines in the terminal as they are meant: what a user calls things is no markup and no emoji code, and one is no plural."""

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


def counted(count: int, noun: str) -> str:
    """A number of things.

    Args:
        count: how many.
        noun: what one of them is called.

    >>> counted(1, "rate"), counted(2, "rate")
    ('1 rate', '2 rates')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
