"""One kind of mistake: how it is found, how severe it is, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from normkit.diagnostics.audit.finding import Evidence, Severity
from normkit.diagnostics.audit.observe import Observed
from normkit.surgery.changes import Changes

Keeps = Literal["", "training", "evaluation", "both"]
Row = tuple[str, Evidence, Callable[[], Changes] | None]
Find = Callable[[Observed], Iterator[Row]]


@dataclass(frozen=True)
class Check:
    """One kind of mistake, named and described by the function that finds it.

    Args:
        find: yields module, evidence and fix of each.
        severity: of its findings.
        cure: what to do, on one line.
        keeps: which function of the model ``fix`` keeps to rounding: in training, in evaluation, or both; "" for no fix.
    """

    find: Find
    severity: Severity
    cure: str
    keeps: Keeps

    @property
    def kind(self) -> str:
        """The name in findings."""
        return self.find.__name__


def check(severity: Severity, cure: str, keeps: Keeps = "") -> Callable[[Find], Check]:
    """Make a function a check."""
    return lambda find: Check(find, severity, cure, keeps)
