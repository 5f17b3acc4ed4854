"""Two processes on the CPU train as one does, with copies of the model and with shards, stopped or not."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lab_samples
from interruption import Stop
from normkit.lab import record, task
from normkit.lab.data.split import Data
from normkit.lab.devices import part
from normkit.lab.protocol import make_data
from normkit.lab.settings import Settings
from normkit.lab.train.fabric import start_fabric
from normkit.lab.train.trainer import Trainer
from normkit.surgery.recipe import apply_recipe
from processes import torchrun

TESTS = Path(__file__).parent


OPTIONS = {"accumulate": 2, "ema": 0.9, "clip": 0.5, "warmup": 1.0, "label_smoothing": 0.1, "epochs": 3}
ALL = float("-inf")
# folder: strategy, recipe, epochs after which it is interrupted, the least first feature of samples that are not ignored
CASES = {
    "ddp": ("ddp", "keep+e@all", (1,), ALL),
    "ddp with padding": ("ddp", "keep+e@all", (), 0.0),
    "shards": ("fsdp", "keep+e@all", (), ALL),
    "resumed shards": ("fsdp", "keep+e@all", (1, 2), ALL),
    "shards with lengths": ("fsdp", "keep+wn", (2,), ALL),
    "shards with padding": ("fsdp", "keep+e@all", (), 1.5),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    torchrun("test_parallel", str(out), folder=out)
    return out


def numbers(out: Path) -> list[Any]:
    rows = record.read_lines(out / "metrics.jsonl")
    kept = [row[key] for row in rows for key in ("train_loss", "val_loss", "val_score")]
    conditions = [value for row in rows for pair in row["condition"].values() for value in pair]
    result = record.read_json(out / "result.json")
    return [*kept, *conditions, result["test_loss"], result["test_score"]]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(tmp_path: Path, two: Path, name: str) -> None:
    _, recipe, _, least = CASES[name]
    train(tmp_path, "auto", recipe, least)
    # Sums in another order: a few units in the last place of single precision, grown over the steps.
    assert numbers(two / name) == pytest.approx(numbers(tmp_path), rel=1e-4)


def test_resumed_shards_are_exact(two: Path) -> None:
    for name in ("metrics.jsonl", "result.json"):
        assert (two / "resumed shards" / name).read_bytes() == (two / "shards" / name).read_bytes()


def padded(data: Data, least: float) -> Data:
    """Ignores targets, so that processes count unlike numbers of them, and some none."""
    train = data.train
    assert isinstance(train.inputs, Tensor)
    targets = torch.where(train.inputs[:, 0] > least, train.targets, task.IGNORED)
    return replace(data, train=replace(train, targets=targets))


def train(out: Path, strategy: str, recipe: str, least: float, stop_at: int = 0) -> None:
    settings = Settings(rates=(0.1,), batch_size=32, accelerator="cpu", strategy=strategy, **OPTIONS)
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 3))
    apply_recipe(model, recipe)
    data = padded(make_data(lab_samples.data, "data"), least)

    def stop(epoch: int, score: float | None) -> None:
        if epoch == stop_at:
            raise Stop

    trainer = Trainer(0.1, 0, settings, model, data, start_fabric(settings), out)
    assert all(isinstance(parameter, DTensor) == (strategy == "fsdp") for parameter in model.parameters())
    try:
        result = trainer.train(stop)
        if trainer.fabric.is_global_zero:
            record.write_json(out / "result.json", result)
    except Stop:
        trainer.fabric.barrier()  # the first process writes the checkpoint that all go on from


if __name__ == "__main__":
    for name, (strategy, recipe, stops, least) in CASES.items():
        for stop_at in (*stops, 0):
            train(Path(sys.argv[1]) / name, strategy, recipe, least, stop_at)
    part()
