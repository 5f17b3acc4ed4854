"""Colours, markers and dashes of recipes, the same in every figure.

The baseline is grey, so that what is compared with it stands out. The hues are Okabe and Ito's, which people with any
common colour blindness can tell apart, darkened or lightened to keep contrast with the ground; markers and dashes say
the same once more for print without colour.

Reference:
    Okabe and Ito 2008, Color universal design, https://jfly.uni-koeln.de/color/
"""

from dataclasses import dataclass
from typing import Literal

Line = Literal["-", "--", "-.", ":"]
BASELINE = ("#4a4a4a", "#c4c4c4")
HUES = (
    ("#0072b2", "#56a9e0"),
    ("#d55e00", "#f0803c"),
    ("#00896a", "#2fc59d"),
    ("#a64d83", "#e08fc0"),
    ("#b07900", "#e6a92b"),
    ("#2f8fc4", "#8fd0f5"),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Line, ...] = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Style:
    """How one recipe is drawn: colours on a light and a dark ground, marker and dash by matplotlib's letters."""

    light: str
    dark: str
    marker: str
    line: Line


def styles(names: list[str], baseline: str) -> list[Style]:
    """A style for each recipe; hues, markers and dashes turn at different periods, so that few pairs repeat."""
    chosen, others = [], 0
    for index, name in enumerate(names):
        light, dark = BASELINE if name == baseline else HUES[others % len(HUES)]
        turn = 0 if name == baseline else others // len(HUES)
        others += name != baseline
        chosen.append(Style(light, dark, MARKERS[(index + turn) % len(MARKERS)], DASHES[turn % len(DASHES)]))
    return chosen
