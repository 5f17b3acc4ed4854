"""A kind of mistake, what is found of it with its evidence in numbers, and the sequence that prints as a table or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from normkit.core.errors import OptionError, SurgeryError, closest
from normkit.diagnostics.audit.observe import Observed
from normkit.surgery.changes import Changes

Severity = Literal["info", "warning", "error"]
Evidence = dict[str, int | float]
Keeps = Literal["", "training", "evaluation", "both"]
Row = tuple[str, Evidence, Callable[[], Changes] | None]
Find = Callable[[Observed], Iterator[Row]]

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
_SHOWN = 3  # rows of one kind in the table; a deep network repeats its mistake in every block


@dataclass(frozen=True)
class Finding:
    """One normalization mistake in one module.

    >>> print(Finding("vanishing_eps", "norm", {"eps": 0.0}, "warning", "raise eps"))
    warning: norm: vanishing_eps (eps 0): raise eps
    """

    kind: str  # what it is, a key of the table of checks
    module: str  # the name of the module, as ``named_modules`` gives it; the model itself is ``"(model)"``
    evidence: Evidence  # what was measured, by name
    severity: Severity  # ``"info"``, ``"warning"`` or ``"error"``
    cure: str  # what to do, on one line
    _fix: Callable[[], Changes] | None = field(default=None, repr=False, compare=False)

    @property
    def fixable(self) -> bool:
        """Whether ``fix`` can be called."""
        return self._fix is not None

    def fix(self) -> Changes:
        """Mend it in place, where that keeps the function; the page on the audit says which function, by kind.

        Returns what was changed, with the way back; raises SurgeryError where mending it would change what the model computes.
        """
        if self._fix is None:
            raise SurgeryError(f"{self.module}: {self.kind} can't be mended without another function; {self.cure}")
        return self._fix()

    @property
    def told(self) -> str:
        """The evidence on one line."""
        numbers = {name: n if isinstance(n, int) else f"{n:.3g}" for name, n in self.evidence.items()}
        return ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in numbers.items())

    def __str__(self) -> str:
        return f"{self.severity}: {self.module}: {self.kind} ({self.told}): {self.cure}"


class Audit(tuple[Finding, ...]):
    """The findings of an audit, the most severe first; prints as a table.

    It is made of findings in any order, and of notes, which say what could not be looked at, and why.

    >>> print(Audit([Finding("zero_rows", "head", {"rows": 2}, "error", "give them a direction")]))
    severity  module  kind       evidence
    error     head    zero_rows  rows 2
    zero_rows: give them a direction
    """

    notes: tuple[str, ...]

    def __new__(cls, findings: Iterable[Finding] = (), notes: Iterable[str] = ()) -> Audit:
        made = super().__new__(cls, sorted(findings, key=lambda each: -SEVERITIES.index(each.severity)))
        made.notes = tuple(notes)
        return made

    def at_least(self, severity: str) -> tuple[Finding, ...]:
        """The findings of a severity or above: ``"info"``, ``"warning"`` or ``"error"``; OptionError for another word.

        >>> Audit([Finding("zero_rows", "head", {"rows": 2}, "error", "")]).at_least("warning")[0].module
        'head'
        """
        if severity not in SEVERITIES:
            hint = closest(severity, SEVERITIES)
            raise OptionError(f"severity is {severity!r}; wanted {', '.join(SEVERITIES)}{hint}")
        return tuple(each for each in self if SEVERITIES.index(each.severity) >= SEVERITIES.index(severity))

    def json(self) -> str:
        """Everything as JSON; a number that is not finite is written as text.

        >>> Audit(notes=["no backward pass"]).json()
        '{"findings": [], "notes": ["no backward pass"]}'
        """
        rows = []
        for each in self:
            numbers = {name: n if math.isfinite(n) else str(n) for name, n in each.evidence.items()}
            told = {"kind": each.kind, "module": each.module, "severity": each.severity, "evidence": numbers}
            rows.append(told | {"cure": each.cure, "fixable": each.fixable})
        return json.dumps({"findings": rows, "notes": self.notes})

    def __str__(self) -> str:
        table, kinds = [("severity", "module", "kind", "evidence")], dict[str, list[Finding]]()
        for each in self:
            kinds.setdefault(each.kind, []).append(each)
        for alike in kinds.values():
            table += [(each.severity, each.module, each.kind, each.told) for each in alike[:_SHOWN]]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in table] if self else ["nothing found"]
        for kind, alike in kinds.items():
            more = f" ({len(alike) - _SHOWN} more modules)" if len(alike) > _SHOWN else ""
            lines.append(f"{kind}{more}: {alike[0].cure}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Check:
    """One kind of mistake, named and described by the function that finds it: yields module, evidence and fix of each."""

    find: Find
    severity: Severity
    cure: str
    keeps: Keeps  # the function of the model that ``fix`` keeps to rounding: in training, in evaluation, or both

    @property
    def kind(self) -> str:
        """The name in findings."""
        return self.find.__name__


def check(severity: Severity, cure: str, keeps: Keeps = "") -> Callable[[Find], Check]:
    """Make a function a check."""
    return lambda find: Check(find, severity, cure, keeps)
