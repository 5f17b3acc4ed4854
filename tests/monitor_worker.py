"""One of two processes that train under a monitor: python monitor_worker.py RANK RENDEZVOUS FOUND."""

import copy
import json
import math
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import normkit as nk


def modes() -> dict[str, Any]:
    mesh, cpu = init_device_mesh("cpu", (2,)), torch.device("cpu")
    return {
        "DDP": DistributedDataParallel,
        "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True),
        "FSDP2": lambda model: fully_shard(model, mesh=mesh),
    }


def train(model: nn.Module, monitor: nk.Monitor | None, rank: int) -> list[dict[str, float]]:
    torch.manual_seed(rank)
    optimizer, records = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(16, 4) + rank), torch.arange(16) % 3).backward()
        optimizer.step()
        records.append(monitor.step() if monitor is not None else None)
    return [record for record in records if record is not None]


def main(rank: int, rendezvous: str, found: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 8), nk.BatchNorm(8), nn.ReLU(), nn.Linear(8, 4))
    report = {}
    for way, wrap in modes().items():
        for who in ("both", "first"):
            model = wrap(copy.deepcopy(made))
            watched = who == "both" or rank == 0
            monitor = nk.Monitor(model, every=2, share=math.inf) if watched else None
            # A process without a monitor would wait for ever for one that sends or gathers.
            report[f"{way}, {who}"] = train(model, monitor, rank)
            if monitor is not None:
                monitor.close()
    with open(f"{found}{rank}", "w") as file:
        json.dump(report, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
