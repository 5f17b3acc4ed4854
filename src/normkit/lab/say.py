"""Lines in the terminal as they are meant: what a user calls things is no markup and no emoji code, and one is no plural."""

import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from normkit.core.errors import NormkitError, RecordError

NORMKIT, PYTHON = Path(__file__).parents[1], Path(sysconfig.get_path("stdlib"))
SITES = {"site-packages", "dist-packages"}  # where packages lie that were installed


class Terminal(Console):
    """Standard output; where it can't be written to, such as on a full disk, work stops in words and can go on later."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if self.file is sys.stdout:
                let_go()
            raise RecordError(
                f"cannot write to standard output: {error.strerror or error}; what was done is kept. Free space, or lead the "
                "output elsewhere, and give the same command to go on"
            ) from error


def let_go() -> None:
    """Leads standard output nowhere: what is held back for one that can't be written to would fail again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(console: Console, text: str) -> None:
    """Prints text letter by letter, without breaking its lines."""
    console.print(Text(visible(text)), soft_wrap=True)


def visible(text: str) -> str:
    """Writes letters that would steer a terminal as Python writes them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def told(error: BaseException) -> str:
    """An error of the user's code, with its file and line there."""
    where = theirs(error)
    return f"{type(error).__name__}: {error}" + (f" (at {where})" if where else "")


def theirs(error: BaseException) -> str:
    """The line of the user's code from which an error came: file, number, function and text; nothing where it came from none.

    It is the innermost line that is neither normkit's nor an installed package's; where there is none, that of a package which
    normkit called, other than torch.
    """
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    for each in reversed(chain):
        if isinstance(each, SyntaxError) and each.filename:
            return f"{each.filename}:{each.lineno}: {(each.text or '').strip()}"
        frames = [frame for frame in traceback.extract_tb(each.__traceback__) if not _of_python(Path(frame.filename))]
        own = [frame for frame in frames if not _installed(Path(frame.filename))]
        if not own and not isinstance(each, NormkitError):
            own = [frame for frame in frames[-1:] if NORMKIT not in Path(frame.filename).parents]
        if own:
            return f"{own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: {own[-1].line}"
    return ""


def _installed(file: Path) -> bool:
    return NORMKIT in file.parents or bool(SITES & {*file.parts})


def _of_python(file: Path) -> bool:
    """Whether a file is Python's own or torch's, or no file at all."""
    site = SITES & {*file.parts}
    return not file.exists() or (PYTHON in file.parents and not site) or (bool(site) and "torch" in file.parts)
