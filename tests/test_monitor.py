"""The monitor in plain loops, under wrappers, and in the trainers and loggers of others."""

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from foreign_norms import wired
from lab_samples import Samples
from normkit.diagnostics import condition_number, gap
from normkit.weights import weight_conditioning
from processes import run_together


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nk.BatchNorm(8), nn.ReLU(), weight_conditioning(nn.Linear(8, 3)))


def train(model: Any, monitor: nk.Monitor, steps: int, run: Callable[..., Any] | None = None) -> list[Any]:
    optimizer, records = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        (run or (lambda model: F.cross_entropy(model(X), Y).backward()))(model)
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
    record = train(model, nk.Monitor(model, share=math.inf), 1)[0]
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
    records = train(model, monitor, 7)
    assert [record is not None for record in records] == [True, False, False, True, False, False, True]
    monitor.close()
    train(twin, nk.Monitor(nn.Identity()), 7)
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_share_of_time_makes_samples_rare() -> None:
    model = net()
    monitor = nk.Monitor(model, every=1, share=1e-6)
    assert sum(record is not None for record in train(model, monitor, 20)) == 1
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
    assert train(model, monitor, 1)[0]["activation/0/std"] < 10


def compiled(model: nn.Module) -> Any:
    model = torch.compile(model, backend="eager")  # pyright: ignore[reportAssignmentType]
    model(X)
    return model


def compiled_within(model: nn.Sequential) -> Any:
    model[0] = compiled(model[0])
    model(X)
    return model


class Checkpointed(nn.Sequential):
    reentrant = False

    def forward(self, input: Tensor) -> Tensor:
        body, x = nn.Sequential(self[0], self[1], self[2]), input.clone().requires_grad_()
        return self[3](checkpoint(body, x, use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True


# torch's compiler calls functions that it deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [compiled, compiled_within, nn.DataParallel, lambda model: Checkpointed(*model), lambda model: Reentrant(*model)],
    ids=["compiled", "compiled within", "DataParallel", "checkpointed", "reentrant"],
)
def test_a_wrapped_model_has_the_record_of_the_plain_one(wrap: Callable[[nn.Module], Any]) -> None:
    # A wrapper may have called the model, which moves what its norm keeps.
    model, wrapped = net(), wrap(net())
    monitor = nk.Monitor(wrapped, every=2, share=math.inf)
    wanted, found = train(model, nk.Monitor(model, share=math.inf), 1)[0], train(wrapped, monitor, 3)
    assert [record is not None for record in found] == [True, False, True]
    kept = ("monitor", "gap")
    assert found[0].keys() == wanted.keys()
    for key in wanted:
        if not key.startswith(kept):
            assert_close(found[0][key], wanted[key], rtol=1e-4, atol=1e-6)
    monitor.close()


def in_parts(model: nn.Module) -> None:
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        (F.cross_entropy(model(x), y) / 2).backward()


def scaled(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(X), Y)
    (1024 * loss).backward()
    for parameter in model.parameters():
        parameter.grad /= 1024  # as a gradient scaler does before the optimizer's step


def test_gradients_that_accumulate_and_that_are_scaled() -> None:
    runs = (None, in_parts, scaled)
    wanted, *others = (train(model := net(), nk.Monitor(model, share=math.inf), 1, run)[0] for run in runs)
    assert wanted.keys() == others[0].keys() == others[1].keys()
    model = net()
    assert_close(others[0]["activation/0/mean"], model[0](X[:8]).mean().item())
    # Of bfloat16, which has three digits.
    assert_close(others[1]["weight_gradient/3"], wanted["weight_gradient/3"], rtol=0.05, atol=0)
    assert_close(others[1]["gradient/3/std"], 1024 * wanted["gradient/3/std"], rtol=0.05, atol=0)


def test_two_processes_record_their_own_and_wait_for_none(tmp_path: Path) -> None:
    first, second = run_together("test_monitor:monitored", 2, tmp_path)
    assert {name.split(",")[0] for name in first} == {"DDP", "FSDP1", "FSDP2"}
    for name, records in first.items():
        assert len(records) == 2
        assert len(second[name]) == (2 if "both" in name else 0)
        assert {"activation/0/std", "gap/1", "gradient/0/std"} <= records[0].keys()
        assert ("condition/0" in records[0]) == ("weight_gradient/3" in records[0]) == name.startswith("DDP")
        assert records[0]["activation/2/mean"] == first["DDP, both"][0]["activation/2/mean"]
    alike = {key for key, value in first["DDP, both"][1].items() if second["DDP, both"][1][key] == value}
    assert {key for key in first["DDP, both"][1] if key.startswith(("condition", "weight_gradient"))} <= alike


def test_what_is_done_in_a_sampled_step_ends_with_it() -> None:
    model = net()
    monitors = [nk.Monitor(model, share=math.inf) for _ in range(2)]  # as of a generator and a critic
    twin = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    twin(X).sum().backward()
    assert not any(key.startswith("activation") for key in monitors[0].step() or ())
    compiled(model)
    monitors[0] = nk.Monitor(model)
    del monitors[1]  # without close()
    monitors.clear()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.compiler.set_stance("default").prev.stance == "default"


def test_models_that_a_monitor_must_take_or_refuse() -> None:
    sparse = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
    monitor = nk.Monitor(sparse, share=math.inf)
    sparse(torch.arange(9)).sum().backward()
    record = monitor.step()
    assert_close(record["weight_gradient/0"], sparse[0].weight.grad.to_dense().norm().item())
    plain = nn.Linear(4, 3)
    monitor = nk.Monitor(plain)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(plain, values, x).sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(plain.named_parameters()), X)
    assert not any(key.startswith("activation") for key in monitor.step() or ())


class Wandb:
    """With the signature of wandb's ``Run.log``, which takes a dict of numbers; the package is not among our tests'."""

    def __init__(self) -> None:
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        json.dumps(data)  # as it is sent
        self.logged.append((step, data))


def test_records_are_for_any_logger(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="a logger that is to take a record")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = net()
    writer, run = tensorboard.SummaryWriter(str(tmp_path)), Wandb()
    records = train(model, nk.Monitor(model, every=2, share=math.inf), 3)
    for step, record in enumerate(records):
        if record is not None:
            run.log(record, step=step)
            for name, value in record.items():
                writer.add_scalar(name, value, step)
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["scalars"]) == set(records[0])
    for name, value in records[0].items():
        assert [event.step for event in read.Scalars(name)] == [0, 2]
        assert_close(read.Scalars(name)[0].value, value, rtol=1e-6, atol=1e-12)
    assert [step for step, _ in run.logged] == [0, 2]


ROWS = Samples(len(X), lambda row: {"x": X[row], "labels": Y[row]})


def with_loss(self: Any, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
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
    trainer = transformers.Trainer(wired(with_loss, net=net()), arguments, train_dataset=ROWS)
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
    trainer.fit(Module(), torch.utils.data.DataLoader(ROWS, batch_size=8))
    head, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {"condition/net.0", "gap/net.1", "gradient/net.2/std", "step"} <= set(head.split(","))
    assert len(rows) == 2


def modes() -> dict[str, Any]:
    mesh, cpu = init_device_mesh("cpu", (2,)), torch.device("cpu")
    return {
        "DDP": DistributedDataParallel,
        "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True),
        "FSDP2": lambda model: fully_shard(model, mesh=mesh),
    }


def trained_under(model: nn.Module, monitor: nk.Monitor | None, rank: int) -> list[dict[str, float]]:
    torch.manual_seed(rank)
    optimizer, records = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(16, 4) + rank), torch.arange(16) % 3).backward()
        optimizer.step()
        records.append(monitor.step() if monitor is not None else None)
    return [record for record in records if record is not None]


def monitored(_: None) -> dict[str, Any]:
    torch.manual_seed(0)
    rank, report = dist.get_rank(), {}
    made = nn.Sequential(nn.Linear(4, 8), nk.BatchNorm(8), nn.ReLU(), nn.Linear(8, 4))
    for way, wrap in modes().items():
        for who in ("both", "first"):
            model = wrap(copy.deepcopy(made))
            watched = who == "both" or rank == 0
            monitor = nk.Monitor(model, every=2, share=math.inf) if watched else None
            # A process without a monitor would wait for ever for one that sends or gathers.
            report[f"{way}, {who}"] = trained_under(model, monitor, rank)
            if monitor is not None:
                monitor.close()
    return report
