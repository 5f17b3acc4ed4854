"""Lines in the terminal as they are meant: what a user calls things is no markup and no emoji code, and one is no plural."""

import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from normkit.core.errors import RecordError


class Terminal(Console):
    """Standard output; where it can't be written to, such as on a full disk, work stops in words and can go on later."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as rich does.

        Raises:
            RecordError: standard output can't be written to.
        """
        try:
            super().print(*objects, **options)
        except OSError as error:
            # What is still held back would fail again when the process ends.
            if self.file is sys.stdout:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise RecordError(
                f"cannot write to standard output: {error.strerror or error}; what was done is kept. Free space, or lead the "
                "output elsewhere, and give the same command to go on"
            ) from error


def say(console: Console, text: str, style: str = "") -> None:
    """Prints text letter by letter, without breaking its lines.

    Args:
        console: where.
        text: what.
        style: of all of it. Default: plain.

    >>> say(Console(width=8), "runs/a[red]b:cancer:c")
    runs/a[red]b:cancer:c
    """
    console.print(Text(visible(text), style=style), soft_wrap=True)


def visible(text: str) -> str:
    r"""Writes letters that would steer a terminal as Python writes them.

    >>> visible("runs/\x1b[2J")
    'runs/\\x1b[2J'
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def counted(count: int, noun: str) -> str:
    """A number of things.

    Args:
        count: how many.
        noun: what one of them is called.

    >>> counted(1, "rate"), counted(2, "rate")
    ('1 rate', '2 rates')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
