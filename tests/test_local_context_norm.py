"""Local context normalization: group normalization at one end, a window for each axis, accuracy."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.group_norm import group_norm
from normkit.activations.local_context_norm import LocalContextNorm, local_context_norm


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 7), (2, 6, 5, 4), (2, 6, 3, 4, 2)])
def test_a_window_over_everything_is_group_norm(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    norm = LocalContextNorm(6, 3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert_close(norm(x), group_norm(x, 2, norm.weight, norm.bias), rtol=1e-9, atol=1e-9)


def test_each_axis_may_have_a_window_of_its_own() -> None:
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    found = local_context_norm(x, 2, (3, 5))[0, :, 2, 3]
    inside = x[0, :, 1:4, 1:6]
    assert_close(found, (x[0, :, 2, 3] - inside.mean()) / (inside.var(correction=0) + 1e-5).sqrt())


def test_accurate_beside_a_step_of_light() -> None:
    x = torch.randn(1, 2, 8, 32)
    x[..., 16:] += 1e4
    found, exact = (local_context_norm(z, 2, 5) for z in (x, x.double()))
    # Means of 1e4 are known to half a unit in the last place, 1e4 * 2^-24 deviations.
    assert_close(found.double(), exact, rtol=0, atol=1e-2)
