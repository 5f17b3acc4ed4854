"""What a surgery verb did, as data that prints as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from torch import nn

from normkit.core.errors import SurgeryError, check_options

Refusal = Literal["raise", "leave"]


@dataclass(frozen=True)
class Change:
    """One layer before and after."""

    layer: str  # its name, as ``named_modules`` gives it; the model itself is ``"(model)"``
    before: str  # what was there
    after: str  # what is there now
    note: str = ""  # what else to know: what was dropped or created
    # By how much the model's output moved, relative to its largest value, where that was measured; else None.
    error: float | None = None

    def with_note(self, note: str) -> Change:
        """The same with one note more."""
        return replace(self, note=f"{self.note}; {note}" if self.note else note)

    @property
    def told(self) -> str:
        """The note, with the error."""
        error = "" if self.error is None else f"error {self.error:.1e}"
        return "; ".join(filter(None, [self.note, error]))

    def __str__(self) -> str:
        return f"{self.layer}: {self.before} -> {self.after}" + (f" ({self.told})" if self.told else "")


@dataclass(frozen=True)
class PassedOver:
    """One layer that was seen and left as it was."""

    layer: str  # its name
    reason: str  # why

    def __str__(self) -> str:
        return f"{self.layer}: left: {self.reason}"


class Refusals(list[PassedOver]):
    """What was passed over, by a verb that raises at the first refusal or leaves such layers."""

    def __init__(self, who: str, on_refusal: Refusal) -> None:
        super().__init__()
        check_options(who, on_refusal=(on_refusal, Refusal))
        self._raises = on_refusal == "raise"

    def take(self, name: str, error: SurgeryError) -> None:
        """Raise an error about a layer, or note that it is left."""
        if self._raises:
            raise error
        self.leave(name, str(error))

    def leave(self, name: str, reason: str) -> None:
        """Note that a layer is left, whatever ``on_refusal`` is."""
        who = label(name)
        self.append(PassedOver(who, reason.removeprefix(f"{who}: ").removeprefix(f"{who} ")))


@dataclass(frozen=True)
class Changes:
    """What a verb changed, as every verb returns it, with the way back: ``undo``.

    >>> print(Changes(nn.Identity(), (Change("stem.norm", "LayerNorm(64)", "RMSNorm(64)", "bias dropped"),)))
    layer      before         after        note
    stem.norm  LayerNorm(64)  RMSNorm(64)  bias dropped
    """

    model: nn.Module  # another object only where the model itself was a norm
    rows: tuple[Change, ...]  # what was changed, one per layer or weight
    passed_over: tuple[PassedOver, ...] = ()  # what was seen and left, with the reason
    # Parameters that the model did not have before, by name; an optimizer given as ``optimizer=`` has them.
    new_parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    _undo: Callable[[], nn.Module] | None = field(default=None, repr=False, compare=False)

    def undo(self) -> nn.Module:
        """Put the model back as it was: layers, parameters, buffers, hooks and modes, and the state of ``optimizer=``.

        Only what the verb changed is taken back. If nothing else happened in between, the model is the old one bit for bit; a
        parameter that the verb kept and that was trained since keeps its present value. What was taken out is where it was, and
        of the dtype: a model that was moved or cast in the meantime is to be moved or cast again.

        Raises:
            SurgeryError: it is undone already, or something else changed the same layers since.

        >>> from normkit import convert
        >>> changes = convert(nn.Sequential(nn.LayerNorm(4)), "rms")
        >>> changes.undo()
        Sequential(
          (0): LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
        )
        """
        if self._undo is None:
            raise SurgeryError("undo: there is no way back from these changes")
        return self._undo()

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be called, as in ``model = accelerate(model); model(x)``."""
        raise TypeError("Changes is not the model: use changes.model")

    def __repr__(self) -> str:
        # Without the model's own repr, which is a page.
        name, new = type(self.model).__name__, len(self.new_parameters)
        return f"Changes({name}: {len(self.rows)} changed, {len(self.passed_over)} passed over, {new} new parameters)"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.rows)

    def __str__(self) -> str:
        table = [("layer", "before", "after", "note")] if self.rows else [("nothing changed",)]
        table += [(row.layer, row.before, row.after, row.told) for row in self.rows]
        if self.passed_over:
            table += [("passed over",), *((left.layer, left.reason) for left in self.passed_over)]
        columns = range(max(map(len, table)))
        parts = [line for line in table if len(line) == 4] + [line for line in table if len(line) == 2]
        widths = [max((len(line[k]) for line in parts if k < len(line) - 1), default=0) for k in columns]
        lines = ([f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)] for line in table)
        return "\n".join("  ".join(line).rstrip() for line in lines)


def label(name: str) -> str:
    """A layer's name in rows and messages: that in the plain model where it is compiled; the root has none of its own."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").rstrip(".") or "(model)"
