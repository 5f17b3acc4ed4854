"""Moments, pooled and in sliding windows: the numerics contract."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.core.moments import Moments, accumulation_dtype, moments
from normkit.engine.pooling import pool
from normkit.engine.window import sliding_mean, sliding_moments, sliding_sum


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("dims", [(1,), (0,), (0, 2), (0, 1, 2)])
def test_variance_holds_to_a_mean_of_1e4_deviations(ratio: float, dims: tuple[int, ...]) -> None:
    x = torch.randn(16, 32, 24) + ratio
    found, exact = moments(x, dims), moments(x.double(), dims)
    # The input's own rounding moves a deviation by at most ratio * 2^-24; twice that for sums.
    assert_close(found.var.double(), exact.var, rtol=max(1e-5, 4 * ratio * 2**-24), atol=0)
    assert_close(found.mean.double(), exact.mean, rtol=2e-7, atol=1e-6)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=0, max_size=6), min_size=1, max_size=5))
def test_merging_equals_the_union(parts: list[list[float]]) -> None:
    tensors = [torch.tensor(part, dtype=torch.float64) for part in parts]
    union = torch.cat(tensors)
    if len(union) == 0:
        return
    merged = Moments(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0)
    for tensor in tensors:
        if len(tensor):
            merged = merged.merge(moments(tensor, (0,)))
    exact = moments(union, (0,))
    assert merged.n == len(union)
    assert_close(merged.mean, exact.mean, rtol=1e-9, atol=1e-9)
    assert_close(merged.var, exact.var, rtol=1e-9, atol=1e-8)  # variances to 1e6 in float64


@given(rows=st.integers(1, 4), columns=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_mask_counts_only_what_is_real(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    found = moments(torch.where(mask, x, math.nan), (1,), mask)
    for row in range(rows):
        real = x[row][mask[row]]
        assert found.n[row, 0] == len(real)
        if len(real):
            assert_close((found.mean[row, 0], found.var[row, 0]), (real.mean(), real.var(correction=0)))


def test_dtype_of_statistics() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert moments(torch.ones(3, dtype=dtype), (0,)).mean.dtype == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64
    with pytest.raises(OptionError, match="int64"):
        moments(torch.ones(3, dtype=torch.int64), (0,))


def test_unbiased_variance_of_one_element_is_undefined() -> None:
    assert moments(torch.ones(1), (0,)).unbiased().isnan().all()
    assert_close(moments(torch.tensor([1.0, 3.0]), (0,)).unbiased(), torch.tensor([2.0]))


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_equals_moments_of_the_union(dims: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    found, wanted = pool(moments(x, (2,)), dims), moments(x, (*dims, 2))
    assert_close((found.mean, found.var), (wanted.mean, wanted.var))
    assert found.n == wanted.n


def test_with_a_mask_sets_count_by_their_elements() -> None:
    x, mask = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 1, 5) > 0.4
    mask[0] = False  # a set without elements counts for nothing
    found, wanted = pool(moments(x, (2,), mask), (0,)), moments(x, (0, 2), mask)
    assert_close((found.mean, found.var, found.n), (wanted.mean, wanted.var, wanted.n))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("before", [0, 1, 2, 6, 20])
@pytest.mark.parametrize("after", [0, 1, 3, 20])
def test_equals_sums_by_loops(size: int, before: int, after: int) -> None:
    x = torch.randn(2, size, 3, dtype=torch.float64)
    wanted = torch.stack([x[:, max(0, i - before) : i + after + 1].sum(1) for i in range(size)], 1)
    assert_close(sliding_sum(x, 1, before, after), wanted)
    assert_close(sliding_sum(x.transpose(0, 1), -3, before, after), wanted.transpose(0, 1))


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
    alone = sliding_mean(x.mean(1), [(1, window), (2, window)])
    for i in range(6):
        for j in range(7):
            inside = x[:, :, max(0, i - reach) : i + ahead + 1, max(0, j - reach) : j + ahead + 1].flatten(1)
            var, mean = torch.var_mean(inside, 1, correction=0)
            assert_close((found.mean.expand(2, 1, 6, 7)[:, 0, i, j], alone.expand(2, 6, 7)[:, i, j]), (mean, mean))
            assert_close(found.var.expand(2, 1, 6, 7)[:, 0, i, j], var)
            number = found.n if isinstance(found.n, int) else found.n.expand(1, 1, 6, 7)[0, 0, i, j].item()
            assert number == inside.shape[1]


def test_a_flat_window_beside_a_step_has_no_variance() -> None:
    x = torch.cat([torch.full((50,), 1e6), torch.full((50,), 0.1)])
    var = sliding_moments(Moments(x, torch.zeros_like(x), 1), [(0, 5)]).var
    # A difference of two box filters would leave some 1e4 or less than nothing here.
    assert_close(torch.cat([var[:48], var[52:]]), torch.zeros(96), rtol=0, atol=1e-12)
    assert (var >= 0).all()
