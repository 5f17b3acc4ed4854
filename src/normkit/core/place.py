"""A norm's place in a network, and the option that a method's word takes in a recipe."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from normkit.core.errors import OptionError
from normkit.core.support import divisors

# Channels first, features last, or several trailing axes, with a weight per element.
Axes = Literal["n c *", "n * c", "trailing"]


@dataclass(frozen=True)
class Place:
    """The place of a norm that is to be replaced: all that a card needs to build the new layer."""

    axes: Axes
    shape: tuple[int, ...]  # of the axes that hold channels or features; one number unless ``axes`` is "trailing"
    option: str = ""  # of the method's word, as read
    eps: float = 1e-5
    momentum: float | None = 0.1  # of the old norm's running statistics; None for the cumulative average
    tracks: bool = False  # whether it kept running statistics
    affine: bool = True  # whether it has a weight or a bias
    bias: bool = True  # whether the new norm gets a bias
    alone: bool = True  # whether it normalized each position separately
    factory: dict[str, Any] = field(
        default_factory=dict
    )  # device and dtype of the parameters, track_running_stats if False
    spatial: int | None = None  # number of spatial axes, if it accepted no other
    kind: str = ""  # name of its method

    @property
    def channels(self) -> int:
        """Number of channels or features."""
        return self.shape[0]

    @property
    def groups(self) -> int:
        """Number of channel groups in the option: ``"32"``, or ``"gcd32"`` for the greatest common divisor with the channels."""
        text = self.option.partition("x")[0]  # as in 32x2, where examples come in groups too
        wanted = int(text.removeprefix("gcd"))
        if text.startswith("gcd"):
            return math.gcd(wanted, self.channels)
        if self.channels % wanted:
            raise OptionError(
                f"{self.channels} channels do not split into {wanted} groups; the groups must divide {self.channels}: "
                f"{divisors(self.channels)}; choose one of these, or gcd{wanted} for the greatest common divisor"
            )
        return wanted

    @property
    def examples(self) -> int:
        """Number of examples per group, in an option such as ``"32x2"``."""
        return int(self.option.partition("x")[2])

    @property
    def over(self) -> str | None:
        """The axes ``c`` or ``c *`` of a channels-first input: by the option, else by the old norm; ``d`` of heads."""
        if self.axes == "n c *":
            return self.option or ("c" if self.alone else "c *")
        return "d" if self.axes == "trailing" and self.option == "d" else None

    def momentum_or(self, default: float) -> float:
        """The momentum of the old norm, or a default where it had none."""
        return self.momentum if self.tracks and self.momentum is not None else default


@dataclass(frozen=True)
class Option:
    """The option that may follow a method's word in a recipe, such as the 32 of ``gn:32``."""

    name: str  # in capitals, for lists and messages: ``gn:GROUPS``
    default: str  # what the word alone implies; "" where that depends on the place
    wanted: str  # the valid options in words
    read: Callable[[str], str]  # the canonical spelling of a text, or ValueError
    of: Callable[[Any], str]  # the option of a layer of this method, in the canonical spelling


def whole_number(name: str, default: int | None, of: Callable[[Any], int | str]) -> Option:
    """Make an option that is a whole number from 1; without a default, the word alone has another meaning."""
    text = "" if default is None else str(default)
    return Option(name, text, "a whole number from 1", _whole, lambda layer: str(of(layer)))


def groups(of: Callable[[Any], Any], examples: str = "") -> Option:
    """Make an option that is a number of channel groups, and of examples per group where ``examples`` gives a default."""
    wanted = "a whole number from 1, or gcd32 for the greatest common divisor of 32 and the channels"
    if not examples:
        return Option("GROUPS", "32", wanted, _groups, lambda layer: str(of(layer)))

    def read(text: str) -> str:
        channels, _, samples = text.partition("x")
        return f"{_groups(channels)}x{_whole(samples)}"

    wanted = f"groups of channels and the examples in a group, such as 32x{examples} or gcd32x{examples}"
    return Option("GROUPSxEXAMPLES", f"32x{examples}", wanted, read, of)


def positive_number(name: str, default: float, of: Callable[[Any], float], most: float = math.inf) -> Option:
    """Make an option that is a number above 0."""
    wanted = "a number above 0" + ("" if most == math.inf else f" and at most {most:g}")

    def read(text: str) -> str:
        if not 0 < float(text) <= most:
            raise ValueError(text)
        return f"{float(text):g}"

    return Option(name, f"{default:g}", wanted, read, lambda layer: f"{of(layer):g}")


def one_of(name: str, *words: str, of: Callable[[Any], str]) -> Option:
    """Make an option that is one of several words, or "" for the word alone."""

    def read(text: str) -> str:
        found = {word.replace(" ", ""): word for word in words}.get(text.replace(" ", ""))
        if found is None:
            raise ValueError(text)
        return found

    return Option(name, "", " or ".join(words), read, of)


def _whole(text: str) -> str:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return str(int(text))


def _groups(text: str) -> str:
    return "gcd" * text.startswith("gcd") + _whole(text.removeprefix("gcd"))
