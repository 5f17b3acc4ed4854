"""Sliding windows against sums by loops, and their accuracy."""

import pytest
import torch
from torch.testing import assert_close

from normkit.core.moments import Moments, moments
from normkit.engine.window import sliding_mean, sliding_moments, sliding_sum


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


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 30, None])
def test_moments_are_of_the_elements_inside(window: int | None) -> None:
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    reach = 30 if window is None else window // 2
    ahead = 30 if window is None else window - 1 - reach
    found = sliding_moments(moments(x, (1,)), [(2, window), (3, window)])
    for i in range(6):
        for j in range(7):
            inside = x[:, :, max(0, i - reach) : i + ahead + 1, max(0, j - reach) : j + ahead + 1].flatten(1)
            var, mean = torch.var_mean(inside, 1, correction=0)
            assert_close(found.mean.expand(2, 1, 6, 7)[:, 0, i, j], mean)
            assert_close(found.var.expand(2, 1, 6, 7)[:, 0, i, j], var)
            number = found.n if isinstance(found.n, int) else found.n.expand(1, 1, 6, 7)[0, 0, i, j].item()
            assert number == inside.shape[1]


def test_a_flat_window_beside_a_step_has_no_variance() -> None:
    x = torch.cat([torch.full((50,), 1e6), torch.full((50,), 0.1)])
    var = sliding_moments(Moments(x, torch.zeros_like(x), 1), [(0, 5)]).var
    # A difference of two box filters would leave some 1e4 or less than nothing here.
    assert_close(torch.cat([var[:48], var[52:]]), torch.zeros(96), rtol=0, atol=1e-12)
    assert (var >= 0).all()
