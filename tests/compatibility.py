"""The table of contexts in docs/compatibility.md, made from the seams.

``python tests/compatibility.py`` writes it between the lines ``<!-- seams -->`` and ``<!-- end -->``.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import module_seams
import value_seams
import view_seams
from seam import SEAMS
from subjects import SUBJECTS, Subject

PARTS = (module_seams, value_seams, view_seams)  # which enter their contexts into the table
CASES = [(one, subject) for one in SEAMS.values() for subject in SUBJECTS if one.applies(subject)]

PAGE = Path(__file__).parent.parent / "docs/compatibility.md"
KINDS = {"layer": "layers", "weight": "weights", "input": "preprocessing"}
_BLOCK = re.compile(r"(<!-- seams -->\n).*?(<!-- end -->)", re.DOTALL)
_NAMED = 5  # the most names that fit into a cell


def cell(tested: Sequence[Subject], every: Sequence[Subject]) -> str:
    """How many are tested, with the names of those that are, or are not, where they are few."""
    if len(tested) in (0, len(every)):
        return f"all {len(every)}" if tested else ""
    rest = [subject for subject in every if subject not in tested]
    said = f"{len(tested)} of {len(every)}"
    if len(tested) <= _NAMED:
        return f"{said}: {', '.join(subject.name for subject in tested)}"
    return f"{said}: not {', '.join(subject.name for subject in rest)}" if len(rest) <= _NAMED else said


def table() -> str:
    """One row per context."""
    lines = [f"| context | {' | '.join(KINDS.values())} | left out, because |", "|---" * (len(KINDS) + 2) + "|"]
    for seam in SEAMS.values():
        tested = [subject for one, subject in CASES if one.name == seam.name]
        cells = [cell([s for s in tested if s.kind == kind], [s for s in SUBJECTS if s.kind == kind]) for kind in KINDS]
        lines.append(f"| {seam.name} | {' | '.join(cells)} | {seam.but} |")
    return "\n".join(lines) + f"\n\n{len(SEAMS)} contexts, {len(CASES)} cases.\n"


def with_table(text: str) -> str:
    """The page with its table as it should be."""
    return _BLOCK.sub(lambda match: f"{match[1]}{table()}{match[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
