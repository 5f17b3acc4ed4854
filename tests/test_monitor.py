"""The monitor in plain loops, under wrappers, and in the trainers of others."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from normkit.core.errors import OptionError
from normkit.diagnostics.conditioning import condition_number
from normkit.diagnostics.gap import gap
from normkit.weights.weight_conditioning import weight_conditioning


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nk.BatchNorm(8), nn.ReLU(), weight_conditioning(nn.Linear(8, 3)))


def train(model: Any, monitor: nk.Monitor, steps: int, x: Tensor, y: Tensor) -> list[dict[str, float] | None]:
    optimizer, records = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        records.append(monitor.step())
    return records


X, Y = torch.arange(64.0).view(16, 4).sin() * 2 + 1, torch.arange(16) % 3


def test_a_record_is_what_was_in_the_step() -> None:
    model, seen = net(), {}
    for name in ("0", "2"):
        model[int(name)].register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    inputs = model[0](X).detach()
    wanted = gap(model.eval(), [X])[0].distance
    model.train()
    record = train(model, nk.Monitor(model, share=math.inf), 1, X, Y)[0]
    assert record is not None
    for name, output in seen.items():
        assert_close(record[f"activation/{name}/std"], output.std(correction=0).item())
        assert_close(record[f"activation/{name}/mean"], output.mean().item())
    assert_close(record["activation/2/zero"], (seen["2"] == 0).float().mean().item())
    # Batch statistics by one pass in float32, and of the batch without eps in the other.
    assert_close(record["gap/1"], wanted, rtol=1e-3, atol=0)
    raw = model[3].parametrizations.weight.original
    assert_close(record["weight_gradient/3"], raw.grad.norm().item())
    assert_close(record["condition/3"], condition_number(model[3].weight), rtol=1e-5, atol=0)
    assert_close(record["condition/0"], condition_number(model[0].weight), rtol=1e-5, atol=0)
    assert all(math.isfinite(value) and isinstance(value, float) for value in record.values())
    assert {key.split("/")[0] for key in record} == {
        "activation", "condition", "gap", "gradient", "monitor", "weight_gradient",
    }  # fmt: skip
    assert inputs.shape == (16, 8)


def test_steps_between_samples_are_free_of_hooks_and_training_is_the_same() -> None:
    model, twin = net(), net()
    monitor = nk.Monitor(model, every=3, share=math.inf)
    records = train(model, monitor, 7, X, Y)
    assert [record is not None for record in records] == [True, False, False, True, False, False, True]
    monitor.close()
    train(twin, nk.Monitor(nn.Identity()), 7, X, Y)
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_share_of_time_makes_samples_rare() -> None:
    model = net()
    monitor = nk.Monitor(model, every=1, share=1e-6)
    assert sum(record is not None for record in train(model, monitor, 20, X, Y)) == 1
    assert monitor.spent > 1e-6 * monitor.elapsed


def test_channels_are_sampled_evenly() -> None:
    model = nn.Sequential(nn.Identity())
    monitor = nk.Monitor(model)
    model(torch.arange(64.0).repeat(5000, 1))
    record = monitor.step()
    assert_close(record["activation/0/mean"], 31.5, rtol=0.01, atol=0)


def test_validation_is_not_looked_at() -> None:
    model = net()
    monitor = nk.Monitor(model, share=math.inf)
    with torch.no_grad():
        model.eval()(X * 100)
    model.train()
    assert train(model, monitor, 1, X, Y)[0]["activation/0/std"] < 10


# torch's compiler calls functions that it deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_and_wrapped_models() -> None:
    model = net()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(X)
    monitor = nk.Monitor(compiled, every=2, share=math.inf)
    records = train(compiled, monitor, 3, X, Y)
    assert [record is not None for record in records] == [True, False, True]
    assert "activation/0/std" in records[0]
    monitor.close()


def test_refusals() -> None:
    with pytest.raises(OptionError, match="every=0"):
        nk.Monitor(net(), every=0)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"x": X[place], "labels": Y[place]}


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_in_the_trainer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the callback is for its Trainer")
    from normkit.diagnostics.transformers import MonitorCallback

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(WithLoss(), arguments, train_dataset=Rows())
    trainer.add_callback(MonitorCallback(trainer.log, every=2, share=math.inf))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "monitor/share" in row]
    assert [row["step"] for row in logged] == [0, 2]
    assert {"condition/net.0", "gap/net.1", "gradient/net.2/std", "weight_gradient/net.3"} <= set(logged[0])


@pytest.mark.filterwarnings("ignore")  # Lightning warns of few workers, few batches and of what it deprecates itself
def test_in_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="the callback is for its Trainer")
    from lightning.pytorch.loggers import CSVLogger

    from normkit.diagnostics.lightning import MonitorCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    logger = CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=logger, callbacks=[MonitorCallback(every=2, share=math.inf)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(Rows(), batch_size=8))
    head, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {"condition/net.0", "gap/net.1", "gradient/net.2/std", "step"} <= set(head.split(","))
    assert len(rows) == 2
