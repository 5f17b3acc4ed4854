"""One process of the synchronized batch normalization test: python sync_worker.py RANK RENDEZVOUS CASES FOUND."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.activations.sync_batch_norm import SyncBatchNorm
from normkit.core.errors import ShapeError


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


if __name__ == "__main__":
    rank, (meet, given, out) = int(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=3)
    cases = torch.load(given, weights_only=False)
    found = {name: run(case, rank) for name, case in cases.items()}
    torch.save({"cases": found, "refused": refused()}, f"{out}{rank}")
    dist.destroy_process_group()
