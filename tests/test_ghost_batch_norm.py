"""Ghost batch normalization: its extremes, uneven and random sub-batches, and what it remembers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.activations.ghost_batch_norm import GhostBatchNorm, ghost_batch_norm


def _x(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, dtype=torch.float64) * 2 + 3


def _trained(norm: GhostBatchNorm, x: Tensor, steps: int = 3) -> GhostBatchNorm:
    for step in range(steps):
        norm(x * (1 + step))
    return norm


@pytest.mark.parametrize(
    ("batch", "sizes"), [(6, [2] * 3), (7, [2, 2, 3]), (3, [3]), (2, [2]), (8, [2] * 4), (9, [2, 2, 2, 3])]
)
def test_a_last_sub_batch_of_one_value_joins_the_one_before(batch: int, sizes: list[int]) -> None:
    x = _x(batch, 3)
    wanted = torch.cat([nn.BatchNorm1d(3).double()(part) for part in x.split(sizes)])
    assert_close(GhostBatchNorm(3, 2).double()(x), wanted)


def test_memory_of_the_mean() -> None:
    x = _x(8, 3, 4)
    parts = torch.stack(x.split(2))
    norm = _trained(GhostBatchNorm(3, 2).double(), x, 1)
    assert_close(norm.running_mean, 0.1 * parts.mean((1, 3)).mean(0))
    assert_close(norm.running_var, 0.9 + 0.1 * parts.transpose(1, 2).flatten(2).var(2).mean(0))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("batch", [8, 7])
def test_memory_one_after_another_is_batch_norm_on_each(batch: int) -> None:
    x, like = _x(batch, 3, 4), nn.BatchNorm1d(3).double()
    norm = _trained(GhostBatchNorm(3, 2, memory="sequential").double(), x)
    for step in range(3):
        for part in x.split(2):
            like(part * (1 + step))
    assert_close(norm.state_dict(), like.state_dict())


def test_memory_of_moments_keeps_the_variance_beside_a_large_mean() -> None:
    x = torch.randn(64, 3, 16) + 1e4
    norm = GhostBatchNorm(3, 8, memory="moments", momentum=0.1)
    with torch.no_grad():
        norm.running_mean.fill_(1e4)
    for _ in range(50):
        norm(x)
    # In float32 E[x^2] - E[x]^2 is a difference of numbers of 1e8, each known to 8: worthless for a variance of 1.
    assert_close(norm.running_var.double(), x.double().var((0, 2), correction=0), rtol=2e-2, atol=0)


def test_random_sub_batches_give_each_sample_its_own_place_back() -> None:
    x = _x(8, 3, 4)
    norm = GhostBatchNorm(3, 4, permute=True).double()
    torch.manual_seed(1)
    found = norm(x)
    torch.manual_seed(1)
    order = torch.randperm(8)
    assert_close(found[order], GhostBatchNorm(3, 4).double()(x[order]))
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    mask[..., 3] = False
    assert (norm(x, mask=mask)[..., 3] == 0).all()


@pytest.mark.parametrize(("memory", "real"), [("mean", 0), ("mean", 1), ("moments", 0), ("sequential", 0)])
def test_a_sub_batch_of_padding_or_with_one_real_value_has_no_variance_to_remember(memory: Any, real: int) -> None:
    x, mask = _x(4, 3, 5), torch.ones(4, 1, 5, dtype=torch.bool)
    mask[2:] = False
    mask[2, :, :real] = True
    norm, like = GhostBatchNorm(3, 2, memory=memory).double(), GhostBatchNorm(3, 2, memory=memory).double()
    norm(x, mask=mask)
    like(x[:2])
    assert_close((norm.running_mean, norm.running_var), (like.running_mean, like.running_var))


def test_the_function_updates_what_it_is_given() -> None:
    x, norm = _x(7, 3, 5), GhostBatchNorm(3, 2).double()
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    assert_close(ghost_batch_norm(x, 2, running_mean=mean, running_var=var), norm(x))
    assert_close((mean, var), (norm.running_mean, norm.running_var))


def test_explain_tells_of_the_samples_left_over() -> None:
    norm = GhostBatchNorm(3, 16)
    text = str(norm.explain(torch.randn(20, 3)))
    assert "one statistic for each of 1 sub-batches x 3 channels = 3, over 16 samples" in text
    assert "the last 4 samples form another sub-batch" in text
    assert "apart" not in norm.explain(torch.randn(32, 3)).why
    assert "over 17 samples" in norm.explain(torch.randn(17, 3)).support
