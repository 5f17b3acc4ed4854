"""Findings of an audit: one mistake with its evidence in numbers, and the sequence that prints as a table or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

from normkit.core.errors import OptionError, SurgeryError, closest
from normkit.surgery.changes import Changes

Severity = Literal["info", "warning", "error"]
Number = int | float

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
_SHOWN = 3  # rows of one kind in the table; a deep network repeats its mistake in every block


@dataclass(frozen=True)
class Finding:
    """One normalization mistake in one module.

    Args:
        kind: what it is, a key of the table of checks.
        module: the name of the module, as ``named_modules`` gives it; the model itself is ``"(model)"``.
        evidence: what was measured, by name.
        severity: ``"info"``, ``"warning"`` or ``"error"``.
        cure: what to do, on one line.

    >>> print(Finding("vanishing_eps", "norm", {"eps": 0.0}, "warning", "raise eps"))
    warning: norm: vanishing_eps (eps 0): raise eps
    """

    kind: str
    module: str
    evidence: dict[str, Number]
    severity: Severity
    cure: str
    _fix: Callable[[], Changes] | None = field(default=None, repr=False, compare=False)

    @property
    def fixable(self) -> bool:
        """Whether ``fix`` can be called."""
        return self._fix is not None

    def fix(self) -> Changes:
        """Mend it in place, where that keeps the function: the page of findings says which function of each kind.

        Returns:
            What was changed, with the way back.

        Raises:
            SurgeryError: mending it would change what the model computes, so that it is left to you.
        """
        if self._fix is None:
            raise SurgeryError(f"{self.module}: {self.kind} can't be mended without another function; {self.cure}")
        return self._fix()

    @property
    def told(self) -> str:
        """The evidence on one line."""
        return ", ".join(f"{name.replace('_', ' ')} {_written(value)}" for name, value in self.evidence.items())

    def __str__(self) -> str:
        return f"{self.severity}: {self.module}: {self.kind} ({self.told}): {self.cure}"


@dataclass(frozen=True)
class Audit(Sequence[Finding]):
    """The findings of an audit, the most severe first; prints as a table.

    Args:
        findings: in order.
        notes: what could not be looked at, and why.

    >>> print(Audit((Finding("zero_rows", "head", {"rows": 2}, "error", "give them a direction"),)))
    severity  module  kind       evidence  cure
    error     head    zero_rows  rows 2    give them a direction
    """

    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...
    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of a severity or above.

        Args:
            severity: ``"info"``, ``"warning"`` or ``"error"``.

        Raises:
            OptionError: another word.

        >>> Audit((Finding("zero_rows", "head", {"rows": 2}, "error", ""),)).at_least("warning")[0].module
        'head'
        """
        if severity not in SEVERITIES:
            hint = closest(severity, SEVERITIES)
            raise OptionError(f"severity is {severity!r}; wanted {', '.join(SEVERITIES)}{hint}")
        return tuple(each for each in self if SEVERITIES.index(each.severity) >= SEVERITIES.index(severity))

    def json(self) -> str:
        """Everything as JSON; a number that is not finite is written as text.

        >>> Audit(notes=("no backward pass",)).json()
        '{"findings": [], "notes": ["no backward pass"]}'
        """
        rows = [
            {
                "kind": each.kind,
                "module": each.module,
                "severity": each.severity,
                "evidence": {name: n if math.isfinite(n) else str(n) for name, n in each.evidence.items()},
                "cure": each.cure,
                "fixable": each.fixable,
            }
            for each in self
        ]
        return json.dumps({"findings": rows, "notes": list(self.notes)})

    def __str__(self) -> str:
        table, shown = [("severity", "module", "kind", "evidence", "cure")], dict[str, int]()
        for each in self:
            shown[each.kind] = shown.get(each.kind, 0) + 1
            if shown[each.kind] <= _SHOWN:
                table.append((each.severity, each.module, each.kind, each.told, each.cure))
        lines = ["nothing found"]
        if len(table) > 1:
            widths = [max(len(row[k]) for row in table) for k in range(4)]
            lines = [
                "  ".join([*(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=False)), row[4]]) for row in table
            ]
        more = [f"{kind}: {n - _SHOWN} more modules" for kind, n in shown.items() if n > _SHOWN]
        return "\n".join([*lines, *more, *(f"note: {note}" for note in self.notes)])


def _written(value: Number) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"
