"""Sliding windows against sums by loops, and their accuracy."""

import pytest
import torch
from torch.testing import assert_close

from normkit.core.window import sliding_mean, sliding_sum


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("before", [0, 1, 2, 6, 20])
@pytest.mark.parametrize("after", [0, 1, 3, 20])
def test_equals_sums_by_loops(size: int, before: int, after: int) -> None:
    x = torch.randn(2, size, 3, dtype=torch.float64)
    wanted = torch.stack([x[:, max(0, i - before) : i + after + 1].sum(1) for i in range(size)], 1)
    assert_close(sliding_sum(x, 1, before, after), wanted)
    assert_close(sliding_sum(x.transpose(0, 1), -3, before, after), wanted.transpose(0, 1))


@pytest.mark.parametrize("window", [1, 2, 3, 5, 30, None])
def test_mean_is_of_the_elements_inside(window: int | None) -> None:
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    reach = 30 if window is None else window // 2
    ahead = 30 if window is None else window - 1 - reach
    wanted = torch.empty_like(x)
    for i in range(6):
        for j in range(7):
            wanted[:, i, j] = x[:, max(0, i - reach) : i + ahead + 1, max(0, j - reach) : j + ahead + 1].mean((1, 2))
    assert_close(sliding_mean(x, [(1, window), (2, window)]).expand_as(x), wanted)


def test_a_small_window_behind_large_elements_is_exact() -> None:
    x = torch.cat([torch.full((100,), 1e8), torch.full((100,), 1e-3)])
    # A running sum in float32 would have lost all of 1e-3 beside 1e10.
    assert_close(sliding_sum(x, 0, 2, 2)[110:190], torch.full((80,), 5e-3))


def test_keeps_the_memory_format() -> None:
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    for dim in (1, 2, 3):
        assert sliding_sum(x, dim, 1, 2).is_contiguous(memory_format=torch.channels_last)
