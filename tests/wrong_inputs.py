"""Models and data as people get them wrong; `here` marks the line that a message must name."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lab_samples import data


def line_of(name: str) -> str:
    """Where the line marked with a name stands, as a message says it."""
    file = Path(__file__)
    number = next(k for k, line in enumerate(file.read_text().splitlines(), 1) if line.endswith(f"# here: {name}"))
    return f"{file}:{number}, in "


def needs_more(classes: int, width: int) -> nn.Module:
    return nn.Linear(width, classes)


def raises() -> nn.Module:
    return nn.Linear(8, -3)  # here: factory


def no_parameters() -> nn.Module:
    return nn.ReLU()


def missing_part(classes: int) -> Any:
    layers = import_module("nosuchpackage")  # here: missing

    return layers


class Wrong(nn.Module):
    """A model whose forward does what it is told."""

    def __init__(self, then: Callable[[Tensor], Any], training: bool = False) -> None:
        super().__init__()
        self.net, self.then, self.late = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)), then, training

    def forward(self, x: Tensor) -> Any:
        if self.training or not self.late:
            return self.then(self.net(x))  # here: late
        return self.net(x)


def widens(x: Tensor) -> Tensor:
    return nn.functional.linear(x, torch.ones(3, 16))  # here: forward


def mismatched() -> nn.Module:
    return Wrong(widens)


def fails_late() -> nn.Module:
    return Wrong(widens, training=True)


def returns_tuple() -> nn.Module:
    return Wrong(lambda y: (y, y))


def returns_nan() -> nn.Module:
    return Wrong(lambda y: y * float("nan"), training=True)


def data_raises() -> dict[str, Any]:
    return {"train": np.load("nowhere.npy")}  # here: data


class Rows(Dataset):
    """Samples one by one, the seventh of which can't be read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        files = ["a"] * 7
        return torch.ones(8) * len(files[row]), row % 3  # here: sample


def broken_rows() -> dict[str, Any]:
    return {"train": Rows(), "test": data()["test"]}


def collates_wrong() -> dict[str, Any]:
    def collate(samples: list[Any]) -> Any:
        return torch.stack([sample["image"] for sample in samples])  # here: collate

    x, y = data()["train"]
    rows = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    return {**data(), "train": DataLoader(rows, batch_size=4, collate_fn=collate)}
