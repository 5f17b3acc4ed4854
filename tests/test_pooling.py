"""Pooled moments against moments of everything at once."""

import pytest
import torch
from torch.testing import assert_close

from normkit.core.moments import moments
from normkit.engine.pooling import pool


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
