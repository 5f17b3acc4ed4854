"""What a surgery verb did, as data that prints as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Change:
    """One layer before and after.

    Args:
        name: of the layer, as ``named_modules`` gives it; the model itself is ``"(model)"``.
        before: what was there.
        after: what is there now.
        note: what else to know: what was dropped or created, an error, or the reason why the layer was left as it was.
    """

    name: str
    before: str
    after: str
    note: str = ""

    def with_note(self, note: str) -> Change:
        """The same with one note more."""
        return replace(self, note=f"{self.note}; {note}" if self.note else note)

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Changes:
    """What a verb changed: the model, which is another object only where the model itself was a norm, and one row per change.

    >>> print(Changes(nn.Identity(), (Change("stem.norm", "LayerNorm(64)", "RMSNorm(64)", "bias dropped"),)))
    layer      before         after        note
    stem.norm  LayerNorm(64)  RMSNorm(64)  bias dropped
    """

    model: nn.Module
    rows: tuple[Change, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing changed"
        table = [
            ("layer", "before", "after", "note"),
            *((row.name, row.before, row.after, row.note) for row in self.rows),
        ]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        return "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        )


def label(name: str) -> str:
    """A layer's name in rows and messages; the root of a model has none of its own."""
    return name or "(model)"
