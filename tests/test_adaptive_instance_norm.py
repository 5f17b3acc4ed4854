"""Adaptive instance normalization: the identity, the moments that come out, strength, masks."""

import pytest
import torch
from torch.testing import assert_close

from normkit.activations.adaptive_instance_norm import AdaptiveInstanceNorm, adaptive_instance_norm
from normkit.core.errors import OptionError, ShapeError


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 9, dtype=torch.float64) * 3 + 5, torch.randn(2, 3, 4, 7, dtype=torch.float64) * 2 - 1


def test_a_content_is_its_own_style() -> None:
    x, _ = _pair()
    assert_close(adaptive_instance_norm(x, x), x, rtol=1e-9, atol=1e-9)


def test_strength_goes_from_the_content_to_the_style() -> None:
    x, style = _pair()
    full = adaptive_instance_norm(x, style)
    assert torch.equal(AdaptiveInstanceNorm(0.0)(x, style), x)
    assert_close(AdaptiveInstanceNorm(0.3)(x, style), 0.7 * x + 0.3 * full)
    each = adaptive_instance_norm(x, style, torch.tensor([0.0, 1.0]))
    assert_close(each, torch.stack([x[0], full[1]]))


def test_refusals() -> None:
    x, style = _pair()
    for wrong in (style[:, :2], torch.cat([style, style]), style[0, 0]):
        with pytest.raises(ShapeError, match="wanted n c \\*"):
            adaptive_instance_norm(x, wrong)
    with pytest.raises(ShapeError, match="one value for each statistic"):
        adaptive_instance_norm(x[..., :1, :1], style)
    with pytest.raises(OptionError, match="strength of shape 3"):
        adaptive_instance_norm(x, style, torch.ones(3))
