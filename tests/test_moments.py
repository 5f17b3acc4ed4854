"""The numerics contract."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.core.moments import Moments, accumulation_dtype, moments


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
            assert_close(found.mean[row, 0], real.mean())
            assert_close(found.var[row, 0], real.var(correction=0))


def test_dtype_of_statistics() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert moments(torch.ones(3, dtype=dtype), (0,)).mean.dtype == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64
    with pytest.raises(OptionError, match="int64"):
        moments(torch.ones(3, dtype=torch.int64), (0,))


def test_unbiased_variance_of_one_element_is_undefined() -> None:
    assert moments(torch.ones(1), (0,)).unbiased().isnan().all()
    assert_close(moments(torch.tensor([1.0, 3.0]), (0,)).unbiased(), torch.tensor([2.0]))
