"""Options, each declared once with its dataclass field: the help, the range, and how a value is read and written.

The command line, the check of a value, the words that give it again, the record and the table of the pages come from there.
"""

import os
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from normkit.core.errors import OptionError, closest

T = TypeVar("T")
WHAT, HOW, WHERE, RECORDS = "What is compared", "How it is trained", "Where it runs", "Records"
# Of a type: which values are of it, what they are called, and what stands for one in help.
_TYPES: dict[type, tuple[Any, str, str]] = {
    str: (str, "a text", "NAME"),
    int: (int, "a whole number", "N"),
    float: (int | float, "a number", "X"),
    tuple: (tuple, "words separated by commas", "A,B,..."),
    Path: (Path, "a path", "PATH"),
}


def at_home(text: str) -> Path:
    """Reads a path; ``~`` is the home folder, which a shell puts only where a word begins, not in ``--output=~/runs``."""
    return Path(os.path.expanduser(text))


@dataclass(frozen=True)
class Option:
    """What is known of an option."""

    help: str = ""  # what it does
    panel: str = HOW  # the group in which help shows it
    metavar: str = ""  # what stands for a value in help
    choices: tuple[str, ...] = ()  # the words it takes
    check: Callable[[Any], bool] = lambda value: True  # whether a value is in range
    wanted: str = ""  # the range in words
    rest: str = ""  # what is said of the default where that depends on other options
    short: str = ""  # a letter, such as "-o"
    variable: str | None = None  # the environment variable that gives it where the command line does not
    alone: str = ""  # the value it has where none follows it
    parse: Callable[[str], Any] | None = None  # reads a value, or raises ValueError
    write: Callable[[Any], str] | None = None  # writes a value as `parse` reads it
    # a record made before the option existed lacks it, and is of the same configuration where it is at rest
    later: bool = False
    once: bool = False  # it has done its work when a command is given again
    always: bool = False  # a command names it at rest too
    name: str = ""
    type: Any = str  # of the field's value; tuple of any tuple
    default: Any = None

    @property
    def spelling(self) -> str:
        """On the command line; a flag that is on at rest has two."""
        dashed = self.name.replace("_", "-")
        return f"--{dashed}/--no-{dashed}" if self.default is True else f"--{dashed}"

    @property
    def placeholder(self) -> str:
        """What stands for a value in help; nothing for a flag."""
        if self.type is bool:
            return ""
        return self.metavar or "|".join(self.choices) or _TYPES.get(self.type, ("", "", "NAME"))[2]

    @property
    def at_rest(self) -> str:
        """What is said of the default; nothing where there is nothing to say."""
        silent = self.type is bool or self.default in (None, (), Path())
        return self.rest or ("" if silent else self.text(self.default))

    def refuse(self, value: Any) -> None:
        if value == self.default:
            return
        if self.choices:
            hint = closest(value, self.choices) if isinstance(value, str) else ""
            good, wanted = value in self.choices, " or ".join(self.choices) + hint
        else:
            of, called, _ = _TYPES.get(self.type, (object, "another value", ""))
            alike = isinstance(value, of) and not (isinstance(value, bool) and self.type is not bool)
            good, wanted = alike and self.check(value), self.wanted or called
        if not good:
            raise OptionError(f"{self.name} is {repr(value) if isinstance(value, str) else value}; wanted {wanted}")

    def read(self, text: str) -> Any:
        by_type = {int: int, float: float, tuple: words, Path: at_home}
        try:
            return (self.parse or by_type.get(self.type, str))(text)
        except ValueError:
            wanted = self.wanted or _TYPES[self.type][1]
            raise OptionError(f"{self.name} is {text!r}; wanted {wanted}") from None

    def text(self, value: Any) -> str:
        """Writes a value as the command line takes it."""
        if self.write is not None:
            return self.write(value)
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def words(self, value: Any) -> list[str]:
        """Writes the option with a value as words of a command line."""
        if isinstance(value, bool):
            return [self.spelling.split("/")[0 if value else -1]]
        return [self.spelling, *([] if self.alone and value == self.alone else [self.text(value)])]


def option(default: T, help: str, panel: str, choices: tuple[str, ...] = (), **more: Any) -> T:
    """Declares a dataclass field that is an option."""
    return field(default=default, metadata={"option": Option(help, panel, choices=choices, **more)})


def options(*classes: Any) -> dict[str, Option]:
    """Gives the options of dataclasses, or of their instances, by name; a field with a default declares one without help."""
    found = {}
    for known in (known for each in classes for known in fields(each) if known.init and known.default is not MISSING):
        union = get_origin(known.type) in (Union, types.UnionType)
        of = next(part for part in get_args(known.type) if part is not type(None)) if union else known.type
        about = known.metadata.get("option", Option())
        if about is None:
            continue
        found[known.name] = replace(about, name=known.name, type=get_origin(of) or of, default=known.default)
    return found


def check(instance: Any) -> None:
    """Checks every option of a dataclass instance."""
    for name, about in options(instance).items():
        about.refuse(getattr(instance, name))


def command(*start: str, of: tuple[Any, ...], **rest: Any) -> list[str]:
    """Writes the words of the command line that gives dataclass instances again."""
    found = [*start]
    for instance in of:
        for name, about in options(instance).items():
            value = getattr(instance, name)
            at_rest = value in (None, about.default, rest.get(name)) and not about.always
            if not about.once and not at_rest:
                found += about.words(value)
    return found


def words(text: str) -> tuple[str, ...]:
    """Reads words separated by commas."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise ValueError("a word is missing")
    return found


def table(*classes: Any) -> str:
    """Writes the options of dataclasses as a table in Markdown, group by group."""
    known = options(*classes).values()
    lines = ["| option | what it does | default |", "|---|---|---|"]
    for panel in dict.fromkeys(about.panel for about in known):
        lines.append(f"| **{panel}** | | |")
        for about in (about for about in known if about.panel == panel):
            what = " ".join(filter(None, (about.spelling, about.placeholder))).replace("|", "\\|")
            said = about.at_rest if about.rest else f"`{about.at_rest}`" if about.at_rest else ""
            lines.append(f"| `{what}` | {about.help} | {said} |")
    return "\n".join(lines) + "\n"
