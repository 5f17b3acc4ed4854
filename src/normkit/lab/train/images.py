"""Training steps that go on after a stop as if there had been none, and short trainings of classifiers of images in memory."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.core.errors import OptionError
from normkit.lab import record
from normkit.lab.data.split import Split
from normkit.lab.folder import CHECKPOINT, make
from normkit.lab.memory import keep_memory
from normkit.lab.seeding import epoch_order, reseed
from normkit.lab.stats import DIVERGED, OK
from normkit.lab.sweep import Work

PAUSE = 20.0  # seconds between checkpoints
CHUNK = 500
VALIDATED = 500
LOOK_EVERY = 50  # steps between looks at the loss


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


Images = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Size(Work):
    """How much is learned, by how wide a network."""

    data: str  # as of load, which `train`, `test` and `halve` are for too
    train: int | None  # as many images
    test: int | None  # likewise
    halve: bool  # average 2x2 pixels
    width: int  # channels of the network's first layer
    epochs: int  # passes over the training images

    def images(self) -> dict[str, Images]:
        return load(self.data, self.train, self.test, self.halve)


@lru_cache(maxsize=2)
def load(name: str, train: int | None = None, test: int | None = None, halve: bool = False) -> dict[str, Images]:
    """Reads images (n, channels, height, width) and labels of each split, standardized, onto the accelerator if there is one."""
    # CIFAR-10's "val" is 500 images where train is subsampled.
    if name == "cifar10":
        from normkit.lab.data.cifar import cifar10

        data = cifar10(train=train, val=None if train is None else VALIDATED, test=test, augment=False)
    elif name == "digits":
        from normkit.lab.data.digits import digits

        data = digits()
    else:
        raise OptionError(f"images: there is no data set {name!r}; there are cifar10 and digits")
    found = {}
    for part, split, count in (("train", data.train, train), ("val", data.val, None), ("test", data.test, test)):
        x, y = (whole[:count].to(device()) for whole in _all(split))
        found[part] = (F.avg_pool2d(x, 2) if halve else x, y)
    return found


class Stream:
    """Training batches by their number, reshuffled for each epoch; what does not fill a batch is left out."""

    def __init__(self, images: Images, batch: int, seed: int, order: Callable[[int], Tensor] | None = None) -> None:
        self.images, self.batch = images, batch
        self.order = order or (lambda epoch: epoch_order(seed, epoch, len(images[0])))
        self._rows = 1, self.order(1)
        self.per_epoch = len(self._rows[1]) // batch

    def __call__(self, number: int) -> Images:
        epoch, place = divmod(number - 1, self.per_epoch)
        if self._rows[0] != epoch + 1:
            self._rows = epoch + 1, self.order(epoch + 1)
        rows = self._rows[1][place * self.batch : (place + 1) * self.batch]
        return self.images[0][rows], self.images[1][rows]


def fit(
    model: nn.Module,
    stream: Stream,
    epochs: int,
    rate: float,
    seed: int,
    folder: Path,
    before: Callable[[float], None] = lambda part: None,
    every: int | None = None,
) -> Walk:
    """Trains a classifier by SGD with momentum 0.9 and cosine decay; ``before(part)`` hears what of the rate is left."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    steps, losses = epochs * stream.per_epoch, Tally(stream.images[0].device)
    every = every or stream.per_epoch
    model.train()

    def step(number: int) -> dict[str, float] | None:
        part = 0.5 * (1 + math.cos(math.pi * (number - 1) / steps))
        before(part)
        for group in optimizer.param_groups:
            group["lr"] = rate * part
        x, y = stream(number)
        loss = F.cross_entropy(model(x), y)
        descend(optimizer, loss, finite=False)  # which would wait for the device at every step
        losses.total += loss.detach().double()
        if number % every and number % LOOK_EVERY:
            return None
        if not torch.isfinite(losses.total):
            raise Diverged
        return None if number % every else {"loss": losses.empty() / every}

    return walk(folder, steps, {"model": model, "optimizer": optimizer, "losses": losses}, step, seed)


class Tally(nn.Module):
    """A sum that is part of a checkpoint."""

    total: Tensor

    def __init__(self, where: torch.device) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64, device=where))

    def empty(self) -> float:
        total = self.total.item()
        self.total.zero_()
        return total


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch: int = CHUNK) -> float:
    """The share of images whose class a model finds, in the mode it is in, in batches of that size, in their order."""
    pairs = zip(*(part.split(batch) for part in images), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(images[0])


def _all(split: Split) -> Images:
    parts = [split.batch(rows, torch.device("cpu")) for rows in torch.arange(len(split)).split(CHUNK)]
    inputs = [part for part, _ in parts if isinstance(part, Tensor)]
    return torch.cat(inputs), torch.cat([labels for _, labels in parts])
