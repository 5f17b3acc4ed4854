"""Synchronized batch normalization: three processes with uneven and empty batches are one batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from foreign_norms import random_
from normkit.activations.sync_batch_norm import SyncBatchNorm, sync_batch_norm
from normkit.core.errors import ShapeError
from processes import run_together

SIZES = [5, 1, 0]


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
        "images": _case(SIZES, 4, 2),
        "vectors": _case([1, 3, 2]),
        "cumulative": _case(SIZES, 4, momentum=None),
        "without affine": _case(SIZES, 4, affine=False),
        "without statistics": _case(SIZES, 4, track_running_stats=False),
        "channels last": _case([0, 2, 3], 4, layout="n * c"),
        "large mean": _case([40, 2, 6], 8, mean=1e4, dtype=torch.float32),
        "bfloat16 input": _case(SIZES, 6, dtype=torch.float32),
        "masked": _case(SIZES, 7),
    }
    cases["bfloat16 input"] |= {"x": cases["bfloat16 input"]["x"].bfloat16()}
    cases["masked"] |= {"mask": torch.rand(6, 1, 7) > 0.3}
    return cases


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What three processes found."""
    return run_together("test_sync_batch_norm:normalized_together", 3, tmp_path_factory.mktemp("sync"), _cases())


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
