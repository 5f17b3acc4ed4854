"""What a run keeps until it is done, holds while others might take it, and gives back to who comes after."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lab_samples
from normkit.core.errors import OptionError
from normkit.lab import record
from normkit.lab.folder import CHECKPOINT, InUseError, locked
from normkit.lab.protocol import make_data, make_model
from normkit.lab.seeding import borrowed_randomness, reseed
from normkit.lab.settings import Settings
from normkit.lab.sweep import sweep
from normkit.lab.train.parallel import start_fabric
from normkit.lab.train.trainer import Trainer

SETTINGS = Settings(epochs=2, batch_size=16, rates=(0.1,), accelerator="cpu", condition=False)


@dataclass(frozen=True)
class Job:
    path: str = "one"
    made_of: int = 1


def counted(job: Job, folder: Path) -> dict[str, Any]:
    record.write_checkpoint(folder / CHECKPOINT, {"step": 1})
    with open(folder / "done", "a") as file:
        file.write("x")
    return {}


def test_a_checkpoint_is_kept_until_the_result_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, write = tmp_path / "runs/one", record.write_json

    def killed(path: Path, value: Any, after: bool) -> None:
        if path.name == "result.json":
            write(path, value) if after else None
            raise KeyboardInterrupt
        write(path, value)

    for after in (False, True):
        monkeypatch.setattr(record, "write_json", lambda path, value, after=after: killed(path, value, after))
        with pytest.raises(KeyboardInterrupt):
            sweep(counted, [Job()], tmp_path, say=list)
        assert (place / CHECKPOINT).exists()
    monkeypatch.setattr(record, "write_json", write)
    sweep(counted, [Job()], tmp_path, say=list)
    assert not (place / CHECKPOINT).exists()
    assert (place / "done").read_text() == "xx"


def test_a_run_that_is_worked_on_is_not_replaced(tmp_path: Path) -> None:
    sweep(counted, [Job()], tmp_path, say=list)
    with locked(tmp_path / "runs/one"), pytest.raises(InUseError):
        sweep(counted, [Job(made_of=2)], tmp_path, say=list, replaces=True)
    assert (tmp_path / "runs/one/result.json").exists()
    sweep(counted, [Job(made_of=2)], tmp_path, say=list, replaces=True)


def test_fewer_samples_than_processes_are_refused(tmp_path: Path) -> None:
    data, fabric = make_data(lab_samples.data, "data"), SimpleNamespace(world_size=500)
    with pytest.raises(OptionError, match=r"128 training samples for 500 processes; wanted at least one each"):
        Trainer(0.1, 0, SETTINGS, lab_samples.model(), data, fabric, tmp_path)


class Noisy:
    """A dataset whose samples are drawn when they are read."""

    drawn: list[float]

    def __len__(self) -> int:
        return 80

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        self.drawn.append(torch.rand(()).item())
        return self.drawn[-1] + torch.arange(8.0) + row % 3, row % 3


def test_what_a_model_draws_does_not_change_the_samples(tmp_path: Path) -> None:
    source, seen = Noisy(), []
    for dropout in (0.0, 0.5):
        source.drawn = []
        data = make_data(lambda: source, "data")
        source.drawn = []
        reseed(0, "init")
        model = nn.Sequential(nn.Dropout(dropout), nn.Linear(8, 3))
        Trainer(0.1, 0, SETTINGS, model, data, start_fabric(SETTINGS), tmp_path / str(dropout)).train()
        seen.append(source.drawn)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > len(seen[0]) / 3  # each epoch draws its own; judging draws the same each time


def restless(made: Any) -> Any:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return made


def test_modes_that_user_code_sets_are_put_back() -> None:
    make_model(lambda: restless(lab_samples.model()), "model", 3)
    make_data(lambda: restless(lab_samples.data()), "data")
    with borrowed_randomness():
        restless(None)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
