"""What a model is trained and judged on: splits of inputs and targets, and how to hold some out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.core.errors import OptionError
from normkit.lab.data.batch import STACKED, Collate, Inputs, each, named, take


@dataclass(frozen=True)
class Split:
    """Samples of one split, held as tensors or read from a map-style dataset when they are asked for."""

    # (n,) class indices, (n, l) a class index per token with -100 ignored, floats, or booleans of any shape
    targets: Tensor
    # a tensor (n, ...), or a tuple or dict of such tensors; None when `source` is given
    inputs: Inputs | None = None
    source: Any = None  # a map-style dataset of samples; None when `inputs` is given
    rows: Tensor | None = None  # the rows of `source` that belong to this split; None when `inputs` is given
    collate: Collate = STACKED  # makes inputs and targets of a list of samples of `source`
    # applied to the inputs of a batch on their device, such as what makes floats of pixels held as bytes
    prepare: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor, device: torch.device) -> tuple[Inputs, Tensor]:
        """Gives the inputs and targets of the samples `index`, on `device`."""
        if self.inputs is None:
            inputs, targets = self.collate(self.samples(index))
        else:
            inputs, targets = take(self.inputs, index), self.targets[index]
        inputs = each(inputs, lambda value: value.to(device))
        return inputs if self.prepare is None else self.prepare(inputs), targets.to(device)

    def samples(self, index: Tensor) -> list[Any]:
        """Reads the samples `index` of the dataset."""
        assert self.rows is not None
        rows = self.rows[index].tolist()
        # As torch's own loader does: a dataset may know a faster way to read many.
        several = getattr(self.source, "__getitems__", None)
        return [self.source[row] for row in rows] if several is None else several(rows)

    def take(self, index: Tensor) -> "Split":
        """Gives the split of the samples `index`."""
        if self.inputs is None:
            assert self.rows is not None
            return replace(self, targets=self.targets[index], rows=self.rows[index])
        return replace(self, targets=self.targets[index], inputs=take(self.inputs, index))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names the tensors that this split holds in memory."""
        if self.inputs is not None:
            yield from named(self.inputs)
        yield "targets", self.targets


@dataclass(frozen=True)
class Data:
    """Three splits and the kind of task they pose."""

    train: Split  # samples to learn from
    val: Split  # samples that choose learning rates
    test: Split  # samples that judge; touched once, at the end of a run
    # changes the inputs of a training batch, given them and a generator on their device
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    notes: tuple[str, ...] = ()  # what was decided on reading, a sentence each

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def kind(self) -> str:
        targets = self.train.targets
        if targets.dtype == torch.bool:
            return "binary" if targets[0].numel() == 1 else "multi-label"
        return "regression" if targets.is_floating_point() else "classification"

    @property
    def score(self) -> str:
        return "r2" if self.kind == "regression" else "accuracy"

    @property
    def classes(self) -> int | None:
        """The number of classes, or None where targets are no class indices."""
        if self.kind != "classification":
            return None
        return 1 + max(int(split.targets.max()) for split in self.splits.values())

    def sha256(self) -> str:
        """Hashes everything held in memory (of datasets read when asked for: the targets alone), and what is done to it."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for part, tensor in split.tensors():
                digest.update(f"{name}.{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
            if split.prepare is not None:
                digest.update(f"{name}.prepare {_identity(split.prepare)}".encode())
        if self.augment is not None:
            digest.update(f"augment {_identity(self.augment)}".encode())
        return digest.hexdigest()


def hold_out(split: Split, fraction: float, seed: int = 0) -> tuple[Split, Split]:
    """Parts a split in two, the same way each time, with each class in proportion where there are classes.

    Gives what is left, and what was held out.
    """
    order = np.random.default_rng(seed).permutation(len(split))
    held = np.zeros(len(split), dtype=bool)
    targets = split.targets.numpy()
    if targets.ndim == 1 and not split.targets.is_floating_point():
        # Rounding the running total, not each class, keeps the whole within one sample of the fraction.
        wanted = 0.0
        for label in np.unique(targets):
            members = order[targets[order] == label]
            before = round(wanted)
            wanted += fraction * len(members)
            held[members[: round(wanted) - before]] = True
    else:
        held[order[: round(fraction * len(split))]] = True
    return split.take(torch.from_numpy(np.flatnonzero(~held))), split.take(torch.from_numpy(np.flatnonzero(held)))


def subset(split: Split, count: int) -> Split:
    """Draws `count` samples, the same each time, with each class in proportion where there are classes.

    A smaller subset is part of a larger one.
    """
    if not 1 <= count <= len(split):
        raise OptionError(f"a subset of {count} is wanted of {len(split)} samples; wanted from 1 to {len(split)}")
    order = np.random.default_rng(0).permutation(len(split))
    targets = split.targets.numpy()
    if targets.ndim == 1 and not split.targets.is_floating_point():
        # Each class is spread evenly over the line from 0 to 1, so that every beginning of the line is in proportion.
        place = np.empty(len(split))
        for label in np.unique(targets):
            members = order[targets[order] == label]
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(place[order], kind="stable")]
    return split.take(torch.from_numpy(np.sort(order[:count])))


def _identity(function: Callable[..., Any]) -> str:
    # A function's own repr holds an address, which differs from process to process.
    if is_dataclass(function):
        return repr(function)
    found = function if hasattr(function, "__qualname__") else type(function)
    return f"{found.__module__}.{found.__qualname__}"
