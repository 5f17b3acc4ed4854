"""A seam: a context in which other people's code meets a layer; the table of them, and how its entries compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from interruption import forked
from laws import channels_first
from subjects import Subject, Values, output

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Seam:
    """A context."""

    name: str
    run: Callable[[Subject], None]
    applies: Callable[[Subject], bool]
    but: str = ""  # to what it does not apply, and why


SEAMS: dict[str, Seam] = {}


def seam(
    name: str, applies: Callable[[Subject], bool] = lambda subject: True, but: str = ""
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enter a context into the table."""

    def enter(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        SEAMS[name] = Seam(name, run, applies, but)
        return run

    return enter


def has_parameters(subject: Subject) -> bool:
    return bool(list(subject.fresh().parameters()))


def is_layer(subject: Subject) -> bool:
    return subject.kind == "layer"


def is_first(subject: Subject) -> bool:
    return is_layer(subject) and channels_first(subject.card)


def is_exact(subject: Subject) -> bool:
    return subject.card.exact_gradient


def near(found: Any, wanted: Any, dtype: torch.dtype = torch.float64, roundings: int = 16) -> None:
    """Equal up to a number of roundings of the largest value; in float64, up to the order of sums."""
    eps = 1e-10 if dtype == torch.float64 else roundings * torch.finfo(dtype).eps
    if isinstance(wanted, Tensor):
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        assert_close(found.double(), wanted.double(), rtol=eps, atol=eps * max(1.0, largest))
        return
    for one, other in zip(found, wanted, strict=True):
        near(one, other, dtype, roundings)


def same(found: Any, wanted: Any) -> None:
    assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def steady(subject: Subject) -> Any:
    """The module in training, or in evaluation where what it computes in training depends on the passes before."""
    made, inputs = subject.fresh(), subject.inputs()
    first = output(made, *inputs)
    return subject.fresh().train(made.training and torch.equal(output(made, *inputs), first))


def cast(inputs: Values, dtype: torch.dtype) -> Values:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def still(subject: Subject) -> Any:
    """The module in a mode in which a pass leaves no trace, as transforms of functions need it."""
    made = subject.fresh()
    return made.eval() if subject.card.running_state else made


def refused(call: Callable[[], object]) -> None:
    """By an exception, and not by the end of the process."""
    assert forked(call) == 1


def is_input_of_networks(subject: Subject) -> bool:
    return subject.kind != "input"
