"""Positional normalization: layer normalization over channels, and the moments that are carried on."""

import pytest
import torch
from torch.testing import assert_close

from normkit.activations.positional_norm import (
    PositionalNorm,
    moment_shortcut,
    positional_moments,
    positional_norm,
)
from normkit.core.errors import OptionError, ShapeError


def _image() -> torch.Tensor:
    return torch.randn(2, 4, 5, 6, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("correction", [0, 1])
def test_the_shortcut_restores_the_moments(correction: int) -> None:
    x, norm = _image(), PositionalNorm(correction=correction)
    moments = norm.moments(x)
    assert moments.mean.shape == moments.deviation.shape == (2, 1, 5, 6)
    assert_close(moment_shortcut(norm(x), moments), x, rtol=1e-9, atol=1e-9)
    later = moment_shortcut(norm(torch.randn_like(x)), moments)
    assert_close(later.mean(1, keepdim=True), moments.mean)
    # But for eps = 1e-5 beside variances that are seldom below 0.1.
    assert_close(later.std(1, keepdim=True, correction=correction), moments.deviation, rtol=1e-2, atol=0)


def test_gradients_flow_through_the_moments() -> None:
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)

    def output(x: torch.Tensor) -> torch.Tensor:
        return moment_shortcut(positional_norm(x).square(), positional_moments(x))

    assert torch.autograd.gradcheck(output, x)
    assert torch.autograd.gradgradcheck(output, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_types_are_float32(dtype: torch.dtype) -> None:
    x = _image().to(dtype)
    moments = positional_moments(x)
    assert moments.mean.dtype == moments.deviation.dtype == torch.float32
    assert moment_shortcut(positional_norm(x), moments).dtype == dtype


def test_refusals() -> None:
    for call in (PositionalNorm(), positional_norm, positional_moments):
        with pytest.raises(ShapeError, match="one value for each statistic"):
            call(torch.ones(2, 1, 5))
    with pytest.raises(OptionError, match="correction=2"):
        PositionalNorm(correction=2)
