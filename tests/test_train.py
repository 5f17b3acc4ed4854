"""One run: what it repeats exactly, and what it does when the loss is lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lab_samples
from normkit.core.errors import RecordError
from normkit.lab import record
from normkit.lab.data.split import Data
from normkit.lab.devices import start_fabric
from normkit.lab.protocol import make_data
from normkit.lab.seeding import borrowed_randomness, epoch_order, init_sha256, order_sha256, reseed
from normkit.lab.settings import Settings
from normkit.lab.train import DIVERGED, Run, Trainer, finished, rate_at

SETTINGS = Settings(epochs=4, batch_size=32, rates=(0.1,), accelerator="cpu", condition=False)
RUN = Run("keep", 0.1, 0)


def made() -> Data:
    return make_data(lab_samples.data, "data")


def trainer(folder: Path, settings: Settings = SETTINGS, data: Data | None = None, run: Run = RUN) -> Trainer:
    reseed(run.seed, "init")
    return Trainer(run, settings, lab_samples.model(), data or made(), start_fabric(settings), folder, {})


class Stop(Exception):
    """Stands for an interruption."""


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_run_resumed_after_any_epoch_ends_alike(tmp_path: Path, optimizer: str) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)
    whole = trainer(tmp_path / "whole", settings).train()

    def stop(epoch: int, score: float | None) -> None:
        raise Stop

    for _ in range(settings.epochs):
        torch.manual_seed(99)  # what happens outside of an epoch must not matter
        with pytest.raises(Stop):
            trainer(tmp_path / "parts", settings).train(stop)
    assert trainer(tmp_path / "parts", settings).train() == whole
    for name in ("metrics.jsonl", "result.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_lines_follow_the_checkpoint(tmp_path: Path) -> None:
    def stop(epoch: int, score: float | None) -> None:
        if epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        trainer(tmp_path).train(stop)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')  # as if killed between the two writings
    trainer(tmp_path).train()
    assert [row["epoch"] for row in record.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("rate", [1e30, 1e6])
def test_divergence_ends_the_run(tmp_path: Path, rate: float) -> None:
    data = make_data(lab_samples.regression, "data")
    settings = replace(SETTINGS, rates=(rate,), schedule="constant", epochs=20)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    result = Trainer(Run("keep", rate, 0), settings, model, data, start_fabric(settings), tmp_path, {}).train()
    assert result["status"] == DIVERGED
    assert result["epochs"] < 20
    assert result["test_score"] is None
    assert record.read_json(tmp_path / "result.json") == result
    assert len(record.read_lines(tmp_path / "metrics.jsonl")) == result["epochs"]


def test_samples_read_one_by_one_train_alike(tmp_path: Path) -> None:
    one = trainer(tmp_path / "tensors").train()
    other = trainer(tmp_path / "dataset", data=make_data(lab_samples.dataset, "data")).train()
    assert one == other


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    assert finished(tmp_path, {"rate": 0.1}) is None
    result = trainer(tmp_path).train()
    assert finished(tmp_path, {"rate": 0.1}) == result
    with pytest.raises(RecordError, match=r"rate is 0\.1 there, 0\.2 now"):
        finished(tmp_path, {"rate": 0.2})


def test_order_depends_on_seed_and_epoch_alone() -> None:
    torch.testing.assert_close(epoch_order(3, 2, 50), epoch_order(3, 2, 50))
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order_sha256(0, 3, 50) != order_sha256(1, 3, 50)


def test_initial_weights_depend_on_the_seed() -> None:
    def drawn(seed: int) -> str:
        reseed(seed, "init")
        return init_sha256(lab_samples.model())

    assert drawn(1) == drawn(1) != drawn(2)


def test_randomness_is_given_back() -> None:
    before = torch.get_rng_state()
    with borrowed_randomness(threads=1):
        reseed(5, "epoch", 1)
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_cosine_ends_near_zero() -> None:
    assert rate_at(SETTINGS, 0.5, 0, 10) == 0.5
    assert rate_at(SETTINGS, 0.5, 5, 10) == pytest.approx(0.25)
    assert rate_at(SETTINGS, 0.5, 9, 10) < 0.02
    assert rate_at(replace(SETTINGS, schedule="constant"), 0.5, 9, 10) == 0.5
