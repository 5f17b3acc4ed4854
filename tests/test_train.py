"""One run: what it repeats exactly, and what it does when the loss is lost."""

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lab_samples
from foreign_norms import random_
from interruption import Stop
from normkit.lab import record, task
from normkit.lab.data.split import Data
from normkit.lab.protocol import make_data
from normkit.lab.seeding import borrowed_randomness, epoch_order, order_sha256, reseed
from normkit.lab.settings import Settings
from normkit.lab.train.average import Average
from normkit.lab.train.fabric import start_fabric
from normkit.lab.train.schedule import rate_at
from normkit.lab.train.trainer import DIVERGED, Trainer, train_step

SETTINGS = Settings(epochs=4, batch_size=32, rates=(0.1,), accelerator="cpu", condition=False)


def made() -> Data:
    return make_data(lab_samples.data, "data")


def trainer(
    folder: Path, settings: Settings = SETTINGS, data: Data | None = None, seed: int = 0, make: Any = lab_samples.model
) -> Trainer:
    reseed(seed, "init")
    return Trainer(settings.rates[0], seed, settings, make(), data or made(), start_fabric(settings), folder)


def interrupt(run: Trainer, after: int = 0) -> None:
    """Trains until an epoch is over, by default the first one that is not done yet."""
    found = not after and (run.folder / "checkpoint.pt").exists()  # those found done are told once

    def stop(epoch: int, score: float | None) -> None:
        nonlocal found
        if after in (0, epoch) and not found:
            raise Stop
        found = False

    with pytest.raises(Stop):
        run.train(stop)


def test_a_run_stopped_before_it_is_judged_ends_alike(tmp_path: Path) -> None:
    data = make_data(lambda: lab_samples.Samples(80, lambda row: (torch.randn(8) + row % 3, row % 3)), "data")
    whole = trainer(tmp_path / "whole", data=data).train()
    interrupt(trainer(tmp_path / "parts", data=data), SETTINGS.epochs)
    torch.manual_seed(99)
    assert trainer(tmp_path / "parts", data=data).train() == whole


def test_lines_follow_the_checkpoint(tmp_path: Path) -> None:
    interrupt(trainer(tmp_path), 2)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')  # as if killed between the two writings
    trainer(tmp_path).train()
    assert [row["epoch"] for row in record.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("rate", [1e30, 1e6])
def test_divergence_ends_the_run(tmp_path: Path, rate: float) -> None:
    data = make_data(lab_samples.regression, "data")
    settings = replace(SETTINGS, rates=(rate,), schedule="constant", epochs=20)
    result = trainer(tmp_path, settings, data, make=lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))).train()
    assert result["status"] == DIVERGED
    assert result["epochs"] < 20
    assert result["test_score"] is None
    assert len(record.read_lines(tmp_path / "metrics.jsonl")) == result["epochs"]


def test_samples_read_one_by_one_train_alike(tmp_path: Path) -> None:
    one = trainer(tmp_path / "tensors").train()
    other = trainer(tmp_path / "dataset", data=make_data(lab_samples.dataset, "data")).train()
    assert one == other


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert_close(epoch_order(3, 2, 50), epoch_order(3, 2, 50))
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order_sha256(0, 3, 50) != order_sha256(1, 3, 50)


def test_randomness_is_given_back() -> None:
    before = torch.get_rng_state()
    with borrowed_randomness(threads=1):
        reseed(5, "epoch", 1)
    assert_close(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        (SETTINGS, [0.5 * (1.0 + math.cos(math.pi * step / 8)) for step in range(8)]),
        (replace(SETTINGS, schedule="constant"), [1.0] * 8),
        (replace(SETTINGS, schedule="step"), [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        (replace(SETTINGS, schedule="constant", warmup=2.0), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (replace(SETTINGS, warmup=1.0), [0.5, 1, 1, *(0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(1, 6))]),
    ],
)
def test_schedules(settings: Settings, rates: list[float]) -> None:
    assert [rate_at(settings, 2.0, step, 8) for step in range(8)] == pytest.approx([2 * rate for rate in rates])


def noisy(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return inputs + torch.randn(inputs.shape, generator=generator)


FEATURES = {
    **{optimizer: {"optimizer": optimizer} for optimizer in ("sgd", "adam", "muon", "muoneq")},
    "accumulate": {"accumulate": 4},
    "ema": {"ema": 0.9},
    "clip": {"clip": 0.05},
    "smoothing": {"label_smoothing": 0.1},
    "warm-up": {"warmup": 1.5, "schedule": "step"},
    "adamw": {"optimizer": "adamw", "ema": 0.5, "accumulate": 2, "clip": 1.0},
    "halves": {"ema": 0.999, "precision": "bf16-true"},
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_resumes_exactly_and_matters(tmp_path: Path, name: str) -> None:
    settings = replace(SETTINGS, **FEATURES[name])
    data = replace(made(), augment=noisy)
    whole = trainer(tmp_path / "whole", settings, data).train()
    for _ in range(settings.epochs):
        torch.manual_seed(99)  # what happens outside of an epoch must not matter
        interrupt(trainer(tmp_path / "parts", settings, data))
    assert trainer(tmp_path / "parts", settings, data).train() == whole
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    plainly = replace(SETTINGS, optimizer=settings.optimizer)
    assert settings == plainly or trainer(tmp_path / "plain", plainly, data).train() != whole


def test_augmentation_is_of_training_alone_and_drawn_by_step(tmp_path: Path) -> None:
    drawn: list[float] = []
    sizes: list[int] = []

    def spy(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        sizes.append(len(inputs))
        drawn.append(torch.rand((), generator=generator).item())
        return inputs

    data = replace(made(), augment=spy)
    result = trainer(tmp_path / "spied", data=data).train()
    assert result == trainer(tmp_path / "plain").train()
    assert sizes == [32] * result["steps"]
    assert len(set(drawn)) == len(drawn)
    again = list(drawn)
    drawn.clear()
    trainer(tmp_path / "again", replace(SETTINGS, optimizer="adam"), data).train()
    assert drawn == again  # the same for every recipe and optimizer
    drawn.clear()
    trainer(tmp_path / "seed", data=data, seed=1).train()
    assert not set(drawn) & set(again)


def plain_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def test_a_batch_in_parts_is_the_batch(tmp_path: Path) -> None:
    def train(name: str, **options: Any) -> list[dict[str, Any]]:
        trainer(tmp_path / name, replace(SETTINGS, **options), make=plain_model).train()
        return record.read_lines(tmp_path / name / "metrics.jsonl")

    for whole, parts in zip(train("whole"), train("parts", accumulate=5), strict=True):
        # Sums in another order: a few units in the last place of single precision, grown over 16 steps.
        assert whole["train_loss"] == pytest.approx(parts["train_loss"], rel=1e-5)
        assert whole["val_loss"] == pytest.approx(parts["val_loss"], rel=1e-5)


def test_parts_weigh_tokens_not_samples(tmp_path: Path) -> None:
    data = make_data(lab_samples.tokens, "data")
    settings = replace(SETTINGS, accumulate=3)
    losses = []
    for some in (SETTINGS, settings):
        runner = trainer(tmp_path / str(some.accumulate), some, data, make=lab_samples.Tagger)
        inputs, targets = data.train.batch(torch.arange(7), torch.device("cpu"))
        losses.append(train_step(runner.fabric, runner.placed, some, inputs, targets))
        losses.append(runner.placed.model.out.weight.detach().clone())
    assert_close((losses[0], losses[1]), (losses[2], losses[3]))


def test_the_average_is_judged_and_the_weights_go_on(tmp_path: Path) -> None:
    runner = trainer(tmp_path / "averaged", replace(SETTINGS, ema=0.99))
    result = runner.train()
    live = record.read_lines(tmp_path / "averaged/metrics.jsonl")
    plainly = trainer(tmp_path / "plain").train()
    rows = record.read_lines(tmp_path / "plain/metrics.jsonl")
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in live]
    assert result["val_loss"] != plainly["val_loss"] == runner.evaluate(runner.data.val).loss
    assert runner.average is not None
    with runner.average.in_place():
        assert runner.evaluate(runner.data.val).loss == result["val_loss"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_average_moves_in_any_precision(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4).to(dtype)
    start = {name: value.detach().double() for name, value in model.named_parameters()}
    average, kept = Average(model, 0.999), 1.0
    random_(model)
    live = copy.deepcopy(model.state_dict())
    for step in range(1, 51):
        average.update(step)
        kept *= min(0.999, (1 + step) / (10 + step))
    assert kept < 1e-6  # of the initial weights, though a thousand steps at 0.999 would keep a third
    for name, value in average.values.items():
        expected = kept * start[name] + (1 - kept) * live[name].double()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)  # 50 roundings of single precision
    with average.in_place():
        assert all(bool((model.state_dict()[name] == value.to(dtype)).all()) for name, value in average.values.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in live.items())


def test_clipping_bounds_a_step(tmp_path: Path) -> None:
    settings = replace(SETTINGS, clip=0.01, momentum=0.0, weight_decay=0.0, schedule="constant")
    runner = trainer(tmp_path, settings)
    before = nn.utils.parameters_to_vector(runner.placed.model.parameters()).clone()
    train_step(runner.fabric, runner.placed, settings, *runner.data.train.batch(torch.arange(32), torch.device("cpu")))
    after = nn.utils.parameters_to_vector(runner.placed.model.parameters())
    # rate * clip, the length of the step; torch divides by the norm plus 1e-6
    assert float((after - before).detach().norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_compiled_it_trains_alike_and_resumes(tmp_path: Path) -> None:
    settings = replace(SETTINGS, compile=True, epochs=2)

    def run(name: str, settings: Settings = settings) -> Trainer:
        return trainer(tmp_path / name, settings, make=plain_model)

    eager = run("eager", replace(settings, compile=False)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says of itself
        compiled = run("compiled").train()
        interrupt(run("parts"))
        assert run("parts").train() == compiled
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "compiled/metrics.jsonl").read_bytes()
    # Fused sums round otherwise.
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-4)


def test_tensorboard_shows_each_epoch_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra of its own")
    settings = replace(SETTINGS, condition=True)

    def run() -> Trainer:
        reseed(0, "init")
        fabric, places = start_fabric(settings), (tmp_path, tmp_path / "curves")
        return Trainer(0.1, 0, settings, lab_samples.model(), made(), fabric, *places)

    interrupt(run(), 2)
    run().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "curves"))
        events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("val_score")]
    rows = record.read_lines(tmp_path / "metrics.jsonl")
    assert seen == [(row["epoch"], pytest.approx(row["val_score"])) for row in rows]
    assert "condition_raw/0" in events.Tags()["scalars"]


def test_records_of_before_stand(tmp_path: Path) -> None:
    before = {  # the configuration of a comparison as it was written before there were these settings
        "model": "m", "data": "d", "recipes": ["keep"], "seeds": [0, 1, 2], "rates": [0.1], "epochs": 4,
        "batch_size": 32, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0001, "schedule": "cosine",
        "target": None, "level": 0.95, "condition": False, "accelerator": "cpu", "devices": "auto",
        "precision": "32-true", "device": "cpu",
    }  # fmt: skip
    settings = replace(SETTINGS, model="m", data="d", recipes=("keep",))
    assert settings.record("cpu") == before
    assert replace(settings, ema=0.9).record("cpu") == {**before, "ema": 0.9}


def images_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 7))


def test_channels_last_trains_alike(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(96, 3, 8, 8, generator=generator), torch.arange(96) % 7
    data = make_data(lambda: {"train": (images[:64], targets[:64]), "test": (images[64:], targets[64:])}, "data")

    def train(name: str, **options: Any) -> dict[str, Any]:
        return trainer(tmp_path / name, replace(SETTINGS, **options), data, make=images_model).train()

    one, other = train("first"), train("last", channels_last=True)
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)  # sums in another order
    assert one["test_top5"] is not None
    assert one["test_score"] <= one["test_top5"] <= 1


def test_among_five(tmp_path: Path) -> None:
    logits = torch.eye(7).flip(0)
    logits[0, :5] = 2.0
    targets = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    sums = task.tally(logits, targets)
    assert task.among_five(sums) == pytest.approx(6 / 7)
    assert trainer(tmp_path).train()["test_top5"] is None  # of three classes all are among five
