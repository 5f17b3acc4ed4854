"""One of two processes that train every layer and parametrization: python distributed_worker.py RANK RENDEZVOUS FOUND."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from normkit.activations.sync_batch_norm import SyncBatchNorm
from subjects import SUBJECTS, Subject, Values, output

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
            found = [
                torch.autograd.grad(loss(net(*one)), list(net.parameters()))
                for net, one in zip(nets, batches, strict=True)
            ]
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


def main(rank: int, meet: str, found: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    report: dict[str, dict[str, str]] = {}
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
    with open(f"{found}{rank}", "w") as file:
        json.dump(report, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
