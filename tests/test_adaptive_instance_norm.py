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


def test_the_output_has_the_styles_moments() -> None:
    x, style = _pair()
    y = adaptive_instance_norm(x, style)
    assert_close(y.mean((2, 3)), style.mean((2, 3)), rtol=1e-9, atol=1e-9)
    # But for eps = 1e-5 beside variances of 4 and 9.
    assert_close(y.std((2, 3), correction=0), style.std((2, 3), correction=0), rtol=1e-5, atol=0)


def test_strength_goes_from_the_content_to_the_style() -> None:
    x, style = _pair()
    full = adaptive_instance_norm(x, style)
    assert torch.equal(AdaptiveInstanceNorm(0.0)(x, style), x)
    assert_close(AdaptiveInstanceNorm(0.3)(x, style), 0.7 * x + 0.3 * full)
    each = adaptive_instance_norm(x, style, torch.tensor([0.0, 1.0]))
    assert_close(each, torch.stack([x[0], full[1]]))


def test_the_style_gets_its_gradient() -> None:
    x, style = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    inputs = (x.requires_grad_(), style.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, s: adaptive_instance_norm(x, s, 0.7), inputs)
    assert torch.autograd.gradgradcheck(lambda x, s: adaptive_instance_norm(x, s, 0.7), inputs)


def test_refusals() -> None:
    x, style = _pair()
    for wrong in (style[:, :2], torch.cat([style, style]), style[0, 0]):
        with pytest.raises(ShapeError, match="wanted n c \\*"):
            adaptive_instance_norm(x, wrong)
    with pytest.raises(ShapeError, match="one value for each statistic"):
        adaptive_instance_norm(x[..., :1, :1], style)
    with pytest.raises(OptionError, match="strength of shape 3"):
        adaptive_instance_norm(x, style, torch.ones(3))
