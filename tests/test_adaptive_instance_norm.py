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


def test_one_style_serves_all_samples() -> None:
    x, style = _pair()
    assert_close(adaptive_instance_norm(x, style[:1]), adaptive_instance_norm(x, style[:1].expand(2, -1, -1, -1)))


def test_the_style_gets_its_gradient() -> None:
    x, style = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    inputs = (x.requires_grad_(), style.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, s: adaptive_instance_norm(x, s, 0.7), inputs)
    assert torch.autograd.gradgradcheck(lambda x, s: adaptive_instance_norm(x, s, 0.7), inputs)


def test_masks_equal_leaving_the_padding_out() -> None:
    x, style = _pair()
    mask, style_mask = torch.zeros(1, 1, 1, 9, dtype=torch.bool), torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    mask[..., :6], style_mask[..., :5] = True, True
    padded, padded_style = torch.where(mask, x, torch.nan), torch.where(style_mask, style, torch.nan)
    for strength in (1.0, 0.4):
        found = adaptive_instance_norm(padded, padded_style, strength, mask=mask, style_mask=style_mask)
        assert_close(found[..., :6], adaptive_instance_norm(x[..., :6], style[..., :5], strength))
        assert (found[..., 6:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_at_every_strength(dtype: torch.dtype) -> None:
    x, style = _pair()
    for strength in (1.0, 0.5, torch.tensor([0.5, 0.25])):
        found = adaptive_instance_norm(x.to(dtype), style.to(dtype), strength)
        assert found.dtype == dtype
        eps = torch.finfo(dtype).eps  # the inputs of up to 20 are rounded, and the result
        exact = adaptive_instance_norm(x, style, strength)
        assert_close(found.double(), exact, rtol=4 * eps, atol=20 * eps)


def test_refusals() -> None:
    x, style = _pair()
    for wrong in (style[:, :2], torch.cat([style, style]), style[0, 0]):
        with pytest.raises(ShapeError, match="wanted n c \\*"):
            adaptive_instance_norm(x, wrong)
    with pytest.raises(ShapeError, match="one value for each statistic"):
        adaptive_instance_norm(x[..., :1, :1], style)
    with pytest.raises(OptionError, match="strength of shape 3"):
        adaptive_instance_norm(x, style, torch.ones(3))
