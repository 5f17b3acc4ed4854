"""One of three processes whose models surgery changes: python surgery_worker.py RANK RENDEZVOUS GIVEN FOUND."""

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normkit as nk

SIZES = [5, 1, 2]


def make() -> nn.Module:
    """Two batch norms, one with an activation in it."""
    torch.manual_seed(0)
    norm = nk.BatchNorm(4, activation="relu")
    return nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2), norm, nn.Flatten(), nn.Linear(36, 2)
    ).double()


def part(x: Tensor, rank: int) -> Tensor:
    return x.split(SIZES)[rank]


def step(model: nn.Module, x: Tensor, whole: int) -> Tensor:
    """One step by the gradient of the sum over the whole batch, which DistributedDataParallel divides by the processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    y = model(x)
    (y.square().sum() * world / whole).backward()
    optimizer.step()
    return y.detach()


def synchronized(model: nn.Module, x: Tensor, whole: int, wrap: Any) -> dict[str, Any]:
    there = nk.convert(model, "sync_bn", source="bn")
    step(wrap(model), x, whole)
    kinds = [type(layer).__name__ for layer in model.children()]
    back = nk.convert(model, "bn", source="sync_bn")
    return {"kinds": kinds, "back": len(back.rows), "rows": len(there.rows), "state": model.state_dict()}


def frozen(model: nn.Module, x: Tensor, whole: int, wrap: Any) -> dict[str, Any]:
    nk.surgery.freeze(model)
    step(wrap(model.train()), x, whole)
    return {"state": model.state_dict()}


def recalibrated(model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    together = dist.is_initialized()
    changes = nk.recalibrate(model, batches, across_processes=together)
    found = {"note": changes.rows[0].note, "state": {key: value.clone() for key, value in model.state_dict().items()}}
    changes.undo()
    return {**found, "undone": model.state_dict()}


def main(rank: int, meet: str, given: str, found: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=3)
    x = torch.load(given)
    mine, wrap = part(x, rank), DistributedDataParallel
    report = {
        "sync": synchronized(make(), mine, len(x), wrap),
        "freeze": frozen(make(), mine, len(x), wrap),
        "recalibrate": recalibrated(make(), list(mine.split(2))),
        "one has none": recalibrated(make(), [] if rank == 0 else [mine]),
    }
    torch.save(report, f"{found}{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
