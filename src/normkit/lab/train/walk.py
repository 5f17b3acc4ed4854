"""Training steps that go on after a stop as if there had been none, for experiments with loops of their own."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkit.lab import record
from normkit.lab.folder import CHECKPOINT, make
from normkit.lab.memory import keep_memory
from normkit.lab.seeding import reseed
from normkit.lab.stats import DIVERGED, OK

PAUSE = 20.0  # seconds between checkpoints


class Diverged(Exception):
    """Raised by a step whose loss is no longer a number; the walk ends there."""


@dataclass(frozen=True)
class Walk:
    """What came of some steps."""

    status: str  # "ok", or "diverged" where a step found no finite loss
    steps: int
    rows: list[dict[str, Any]]  # what steps gave, in order


def walk(
    folder: Path, steps: int, parts: Mapping[str, Any], step: Callable[[int], Mapping[str, Any] | None], seed: int
) -> Walk:
    """Does steps 1 to `steps`, from the last checkpoint in `folder` on, which stays until the result is written.

    Before each step the global generators are seeded by `seed` and the step's number, so that what a step draws does not depend
    on where the walk was interrupted. `parts` are what changes from step to step, by name, each with a state dict; what
    `step` gives, if not None, is kept as a row, and it may raise :class:`Diverged`.
    """
    keep_memory()
    make(folder)
    path, done, rows = folder / CHECKPOINT, 0, []
    if path.exists():
        state = record.read_checkpoint(path, ("step", "rows", *parts))
        done, rows = state["step"], state["rows"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    kept = time.monotonic()
    for number in range(done + 1, steps + 1):
        reseed(seed, "step", number)
        try:
            row = step(number)
        except Diverged:
            return Walk(DIVERGED, number, rows)
        if row is not None:
            rows.append({"step": number, **row})
        if time.monotonic() - kept > PAUSE or number == steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            record.write_checkpoint(path, {"step": number, "rows": rows, **states})
            kept = time.monotonic()
    return Walk(OK, max(steps, done), rows)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, finite: bool = True) -> None:
    """Takes a step of an optimizer down a loss; one that is not finite ends the walk, where that is to be looked at."""
    if finite and not torch.isfinite(loss):
        raise Diverged
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
