"""One process of the test of weights in several processes: python weights_worker.py RANK WORLD RENDEZVOUS FOUND."""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from test_weight_laws import METHODS


def fsdp2(model: nn.Module) -> nn.Module:
    for layer in (model[0], model[2]):  # pyright: ignore[reportIndexIssue]
        fully_shard(layer)
    fully_shard(model)
    return model


fsdp1 = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
STRATEGIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp1": fsdp1,
    "fsdp1, original parameters": partial(fsdp1, use_orig_params=True),
    "fsdp2": fsdp2,
}
# FSDP shards no scalars, as one length of a whole weight is.
CASES = [(s, m) for s in STRATEGIES for m in METHODS if s == "ddp" or m != "weight norm, one length"]


def sample(method: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make = METHODS[method]
    model = nn.Sequential(make(nn.Linear(6, 5).double()), nn.Tanh(), make(nn.Linear(5, 3).double()))
    return model, torch.randn(8, 6).double(), torch.randn(8, 3).double()


def train(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """The outputs of three steps, and of the model after them."""
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        y = model(x)
        (y - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(y.detach())
    return [*found, model.eval()(x).detach()]


def main(rank: int, world: int, rendezvous: str, found: str) -> None:
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    results: dict[tuple[str, str], list[Tensor]] = {}
    for strategy, method in CASES:
        model, x, target = sample(method)
        mine = slice(rank, None, world)
        results[strategy, method] = train(STRATEGIES[strategy](model), x[mine], target[mine])
    torch.save(results, f"{found}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
