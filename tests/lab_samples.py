"""Factories for the tests of the lab: small, quick, and some that break the protocol."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from normkit.lab.comparison import compare
from normkit.lab.settings import Settings

# A comparison of seconds.
SMALL = Settings(recipes=("keep", "keep+e"), seeds=(0, 1), rates=(0.05, 0.2), epochs=3, batch_size=32)
SMALL = replace(SMALL, extend=False, accelerator="cpu")


def model(classes: int = 3) -> nn.Module:
    """A perceptron with dropout, so that the random state matters along training."""
    first = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1)
    return nn.Sequential(*first, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))


def data() -> dict[str, Any]:
    """Three classes that a line nearly separates."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(240, 8)).astype(np.float32)
    targets = (inputs @ rng.normal(size=(8, 3)) + 0.3 * rng.normal(size=(240, 3))).argmax(1)
    return {"train": (inputs[:160], targets[:160]), "test": (inputs[160:], targets[160:])}


class Samples(Dataset):
    """As many samples as are said, each read by a function when it is asked for."""

    def __init__(self, count: int, read: Callable[[int], Any]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        if row >= self.count:
            raise IndexError
        return self.read(row)


def dataset() -> dict[str, Any]:
    """The same samples, one at a time."""
    parts = data().items()
    return {part: Samples(len(y), lambda i, x=x, y=y: (torch.from_numpy(x[i]), int(y[i]))) for part, (x, y) in parts}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def regression() -> dict[str, Any]:
    inputs = torch.randn(120, 8)
    targets = inputs[:, 0] - 2 * inputs[:, 1]
    return {"train": (inputs[:90], targets[:90]), "test": (inputs[90:], targets[90:])}


def one_output() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


class Tagger(nn.Module):
    """Logits for every token, in an object as transformers return it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(11, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.out(self.embedding(input_ids) * attention_mask[..., None]))


def tokens() -> dict[str, Any]:
    ids = torch.randint(0, 11, (60, 5))
    mask = torch.ones(60, 5)
    mask[::2, 3:] = 0
    labels = torch.where(mask.bool(), ids % 4, -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    train, test = slice(0, 40), slice(40, 60)
    return {
        part: ({name: value[rows] for name, value in inputs.items()}, labels[rows])
        for part, rows in {"train": train, "test": test}.items()
    }


def no_module() -> str:
    return "not a module"


def nan_labels() -> dict[str, Any]:
    made = regression()
    made["train"][1][7] = float("nan")
    return made


def changed(**parts: Any) -> Callable[[], dict[str, Any]]:
    """A data factory with some of its parts replaced."""
    return lambda: {**data(), **parts}


def posing(factory: Any, original: Any) -> Any:
    """Another factory under the same name, as after an edit."""
    factory.__module__, factory.__qualname__ = original.__module__, original.__qualname__
    return factory


other_data = posing(changed(test=data()["train"]), data)


def compared(folder: Path, settings: Settings = SMALL, **options: Any) -> dict[str, Any]:
    """A comparison of the perceptron on the three classes, without a report."""
    given: dict[str, Any] = {"model": model, "data": data, "report": False, "console": Console(quiet=True), **options}
    return compare(settings, folder, **given)
