"""Several processes compute what one does: training, surgery, and synchronized norms of uneven and empty batches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import normkit as nk
from foreign_norms import random_
from normkit.activations.sync_batch_norm import SyncBatchNorm, sync_batch_norm
from normkit.core.errors import ShapeError
from processes import run_together
from subjects import SUBJECTS, Subject, Values, output

Report = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """What each process found, started once for all modes."""
    return run_together("test_distributed:trained_by_all", 2, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("mode", ["DDP", "FSDP1", "FSDP1, use_orig_params", "FSDP2"])
def test_two_processes_train_as_one(mode: str, reports: list[Report]) -> None:
    for report in reports:
        assert len(report[mode]) > 50
        wrong = [f"{name}: {text}" for name, text in report[mode].items() if text]
        assert not wrong, "\n".join(wrong)


WORLD, STEPS, RATE = 2, 2, 0.05


class Net(nn.Module):
    """The subject behind a product with trained factors, so that there is something to train, and a gradient of the input."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones_like(subject.inputs()[0][:1]))
        self.norm = subject.fresh().train()  # in which power iteration goes on

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        return output(self.norm, x * self.factors, *extra)


def batch(subject: Subject, rank: int, step: int) -> Values:
    x, *extra = subject.inputs()
    return x * (1 + rank) + torch.linspace(0, 1 + step, x.numel(), dtype=x.dtype).cos().view(x.shape), *extra


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(0, 5, y.numel(), dtype=y.dtype).sin().view(y.shape)).sum()


def step(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(RATE * gradient)


def alone(subject: Subject, broadcasts: bool) -> dict[str, Tensor]:
    """The trained parameters by one process that sees what both see, and averages their gradients."""
    nets = [Net(subject)]
    nets.append(copy.deepcopy(nets[0]))
    joint = any(isinstance(module, SyncBatchNorm) for module in nets[0].modules())
    for number in range(STEPS):
        batches = [batch(subject, rank, number) for rank in range(WORLD)]
        if broadcasts:
            for buffer, first in zip(nets[1].buffers(), nets[0].buffers(), strict=True):
                buffer.copy_(first)
        if joint:  # the processes' batches are one
            ys = nets[0](torch.cat([x for x, *_ in batches])).chunk(WORLD)
            whole = sum(loss(y) for y in ys) / WORLD
            mean = list(torch.autograd.grad(whole, list(nets[0].parameters())))
        else:
            pairs = zip(nets, batches, strict=True)
            found = [torch.autograd.grad(loss(net(*one)), list(net.parameters())) for net, one in pairs]
            mean = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
        for net in nets:
            step(list(net.parameters()), mean)
    return {key: value.detach() for key, value in nets[0].named_parameters()}


def trained(subject: Subject, wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """The trained parameters by both processes."""
    net = wrap(Net(subject))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss(net(*batch(subject, dist.get_rank(), number))).backward()
        optimizer.step()
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))


def modes() -> dict[str, Callable[[nn.Module], Any]]:
    mesh, cpu = init_device_mesh("cpu", (WORLD,)), torch.device("cpu")
    return {
        "DDP": DistributedDataParallel,
        "FSDP1": functools.partial(FullyShardedDataParallel, device_id=cpu, use_orig_params=False),
        "FSDP1, use_orig_params": functools.partial(FullyShardedDataParallel, device_id=cpu, use_orig_params=True),
        "FSDP2": functools.partial(fully_shard, mesh=mesh),
    }


def trained_by_all(_: None) -> Report:
    """For each mode the layers and parametrizations with what was wrong."""
    report: Report = {}
    for mode, wrap in modes().items():
        report[mode] = {}
        for subject in SUBJECTS:
            if subject.kind == "input":
                continue  # fitted before, it has no parameter to train
            if mode != "DDP" and any(parameter.dim() == 0 for parameter in subject.fresh().parameters()):
                continue  # torch refuses to shard a number
            try:
                state = trained(subject, wrap)
                for key, wanted in alone(subject, mode == "DDP").items():
                    # Sums in another order, through two steps.
                    assert_close(state[key], wanted, rtol=1e-9, atol=1e-9)
                report[mode][subject.name] = ""
            except Exception as error:
                report[mode][subject.name] = f"{type(error).__name__}: {error}"
    return report


@pytest.fixture(scope="module")
def data() -> torch.Tensor:
    return torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double() + 1


@pytest.fixture(scope="module")
def changed(data: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    return run_together("test_distributed:changed_by_all", 3, tmp_path_factory.mktemp("surgery"), data)


def test_synchronized_norms_there_and_back(data: torch.Tensor, changed: list[dict[str, Any]]) -> None:
    alone = make()
    step_by_all(alone, data, len(data))  # batch normalization of the whole batch
    for report in changed:
        found = report["sync"]
        assert (found["rows"], found["back"], found["kinds"].count("SyncBatchNorm")) == (2, 2, 2)
        assert_close(dict(found["state"]), dict(alone.state_dict()), rtol=1e-9, atol=1e-9)  # sums in another order


def test_frozen_norms_stay_in_every_process(data: torch.Tensor, changed: list[dict[str, Any]]) -> None:
    alone, before = make(), make().state_dict()
    state = frozen(alone, data, len(data), lambda model: model)["state"]
    for report in changed:
        found = report["freeze"]["state"]
        assert_close(dict(found), dict(state), rtol=1e-9, atol=1e-9)
        for key in before:
            assert torch.equal(found[key], before[key]) == key.startswith(("1.", "3."))


@pytest.mark.parametrize("case", ["recalibrate", "one has none"])
def test_recalibration_counts_the_batches_of_all(case: str, data: torch.Tensor, changed: list[dict[str, Any]]) -> None:
    seen = [part for size in (data.split(SIZES)) for part in size.split(2)]
    seen = seen if case == "recalibrate" else list(data.split(SIZES)[1:])
    alone = recalibrated(make(), seen)
    for report in changed:
        found = report[case]
        assert_close(dict(found["state"]), dict(alone["state"]), rtol=1e-9, atol=1e-9)
        assert_close(dict(found["state"]), dict(changed[0][case]["state"]), rtol=0, atol=0)
        assert_close(dict(found["undone"]), dict(make().state_dict()), rtol=0, atol=0)
        assert found["note"] == alone["note"]


SIZES = [5, 1, 2]


def make() -> nn.Module:
    """Two batch norms, one with an activation in it."""
    torch.manual_seed(0)
    norm = nk.BatchNorm(4, activation="relu")
    body = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2), norm
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 2)).double()


def part(x: Tensor, rank: int) -> Tensor:
    return x.split(SIZES)[rank]


def step_by_all(model: nn.Module, x: Tensor, whole: int) -> Tensor:
    """One step by the gradient of the sum over the whole batch, which DistributedDataParallel divides by the processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    y = model(x)
    (y.square().sum() * world / whole).backward()
    optimizer.step()
    return y.detach()


def synchronized(model: nn.Module, x: Tensor, whole: int, wrap: Any) -> dict[str, Any]:
    there = nk.convert(model, "sync_bn", source="bn")
    step_by_all(wrap(model), x, whole)
    kinds = [type(layer).__name__ for layer in model.children()]
    back = nk.convert(model, "bn", source="sync_bn")
    return {"kinds": kinds, "back": len(back.rows), "rows": len(there.rows), "state": model.state_dict()}


def frozen(model: nn.Module, x: Tensor, whole: int, wrap: Any) -> dict[str, Any]:
    nk.surgery.freeze(model)
    step_by_all(wrap(model.train()), x, whole)
    return {"state": model.state_dict()}


def recalibrated(model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    together = dist.is_initialized()
    changes = nk.recalibrate(model, batches, across_processes=together)
    found = {"note": changes.rows[0].note, "state": {key: value.clone() for key, value in model.state_dict().items()}}
    changes.undo()
    return {**found, "undone": model.state_dict()}


def changed_by_all(x: Tensor) -> dict[str, Any]:
    mine, wrap = part(x, dist.get_rank()), DistributedDataParallel
    return {
        "sync": synchronized(make(), mine, len(x), wrap),
        "freeze": frozen(make(), mine, len(x), wrap),
        "recalibrate": recalibrated(make(), list(mine.split(2))),
        "one has none": recalibrated(make(), [] if dist.get_rank() == 0 else [mine]),
    }


UNEVEN = [5, 1, 0]


def _case(sizes: list[int], *shape: int, mean: float = 2.0, dtype: torch.dtype = torch.float64, **options: Any) -> dict:
    last = options.get("layout") == "n * c"
    x = torch.randn(sum(sizes), 3, *shape, dtype=dtype) * 2 + mean
    norm = SyncBatchNorm(3, **options).to(dtype)
    random_(norm, mean=1.0)
    masked = options.pop("masked", False)
    x = x.movedim(1, -1).contiguous() if last else x
    return {
        "x": x,
        "direction": torch.randn_like(x),
        "mask": torch.rand(x.shape[0], 1, *x.shape[2:]) > 0.3 if masked else None,
        "sizes": sizes,
        "dtype": dtype,
        "options": options,
        "state": norm.state_dict(),
    }


def _cases() -> dict[str, dict]:
    torch.manual_seed(0)
    cases = {
        "images": _case(UNEVEN, 4, 2),
        "vectors": _case([1, 3, 2]),
        "cumulative": _case(UNEVEN, 4, momentum=None),
        "without affine": _case(UNEVEN, 4, affine=False),
        "without statistics": _case(UNEVEN, 4, track_running_stats=False),
        "channels last": _case([0, 2, 3], 4, layout="n * c"),
        "large mean": _case([40, 2, 6], 8, mean=1e4, dtype=torch.float32),
        "bfloat16 input": _case(UNEVEN, 6, dtype=torch.float32),
        "masked": _case(UNEVEN, 7),
    }
    cases["bfloat16 input"] |= {"x": cases["bfloat16 input"]["x"].bfloat16()}
    cases["masked"] |= {"mask": torch.rand(6, 1, 7) > 0.3}
    return cases


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What three processes found."""
    return run_together("test_distributed:normalized_together", 3, tmp_path_factory.mktemp("sync"), _cases())


@pytest.mark.parametrize("name", _cases())
def test_three_processes_are_one_batch(name: str, found: list[dict]) -> None:
    case = _cases()[name]
    norm = SyncBatchNorm(3, **case["options"]).to(case["dtype"])  # in one process it is held to torch's by other tests
    norm.load_state_dict(case["state"])
    x = case["x"].clone().requires_grad_()
    y = norm(x, mask=case["mask"])
    loss = (y * case["direction"]).sum() + y.pow(3).sum() / 10
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    second = torch.autograd.grad((first * case["direction"]).sum(), x, retain_graph=True)[0]
    loss.backward()
    ranks = [rank["cases"][name] for rank in found]
    # The union's sums are taken in another order; in float32 that moves a mean of 1e4 by a few units of 1e-3.
    close = {"rtol": 1e-9, "atol": 1e-9} if case["dtype"] == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for key, wanted in (("y", y.detach()), ("dx", x.grad), ("ddx", second)):
        assert_close(torch.cat([rank[key] for rank in ranks]), wanted, **close)
    for key, parameter in norm.named_parameters():
        assert_close(sum(rank["parameters"][key] for rank in ranks), parameter.grad, **close)
    state = norm.state_dict()
    for rank in ranks:
        assert_close(rank["state"], state, **close)
        assert_close(rank["state"], ranks[0]["state"], rtol=0, atol=0)
    assert_close(torch.cat([rank["eval"] for rank in ranks]), norm.eval()(x).detach(), **close)


def test_one_value_in_all_processes_is_refused_in_all(found: list[dict]) -> None:
    assert all(rank["refused"] for rank in found)


def test_is_torchs_by_arguments_and_state() -> None:
    norm, like = SyncBatchNorm(3, 1e-3, 0.2, True, True, None), nn.SyncBatchNorm(3, 1e-3, 0.2, True, True, None)
    like.load_state_dict(norm.state_dict())
    norm.load_state_dict(like.state_dict())
    assert repr(norm) == repr(like)
    x = torch.randn(4, 3, 5)
    assert_close(norm.eval()(x), like.eval()(x))


def test_function_in_one_process() -> None:
    x = torch.randn(4, 3, 5)
    mean, var = torch.zeros(3), torch.ones(3)
    norm = nn.BatchNorm1d(3)
    assert_close(sync_batch_norm(x, mean, var), norm(x))
    assert_close((mean, var), (norm.running_mean, norm.running_var))


def run(case: dict[str, Any], rank: int) -> dict[str, Any]:
    norm = SyncBatchNorm(3, **case["options"]).to(case["dtype"])
    norm.load_state_dict(case["state"])
    x: Tensor = case["x"].split(case["sizes"])[rank].clone().requires_grad_()
    direction = case["direction"].split(case["sizes"])[rank]
    mask = None if case["mask"] is None else case["mask"].split(case["sizes"])[rank]
    y = norm(x, mask=mask)
    loss = (y * direction).sum() + y.pow(3).sum() / 10
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    second = torch.autograd.grad((first * direction).sum(), x, retain_graph=True)[0]
    loss.backward()
    parameters = {name: p.grad for name, p in norm.named_parameters()}
    state = {key: value.clone() for key, value in norm.state_dict().items()}
    return {
        "y": y.detach(), "dx": x.grad, "ddx": second, "parameters": parameters, "state": state,
        "eval": norm.eval()(x).detach(),
    }  # fmt: skip


def refused() -> bool:
    """One value per channel in all processes together."""
    try:
        SyncBatchNorm(3)(torch.randn(1 if dist.get_rank() == 1 else 0, 3))
    except ShapeError as error:
        return "more than 1 value per channel" in str(error)
    return False


def normalized_together(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"cases": {name: run(case, dist.get_rank()) for name, case in cases.items()}, "refused": refused()}
