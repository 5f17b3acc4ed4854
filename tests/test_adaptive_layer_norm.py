"""Adaptive layer normalization: what it starts as, what it broadcasts over, and the diffusion transformer's own formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from normkit.activations.adaptive_layer_norm import (
    AdaLayerNorm,
    AdaLayerNormOutput,
    AdaLayerNormZeroBlock,
    adaptive_layer_norm,
)
from normkit.core.errors import ShapeError


def _block(features: int = 8, condition: int = 6) -> AdaLayerNormZeroBlock:
    mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU("tanh"), nn.Linear(4 * features, features))
    return AdaLayerNormZeroBlock(features, condition, attn=nn.Linear(features, features), mlp=mlp).double()


def _random(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)


def test_starts_as_plain_layer_norm_and_otherwise_where_asked() -> None:
    x, condition = torch.randn(3, 5, 8) * 4 + 2, torch.randn(3, 6)
    assert_close(AdaLayerNorm(8, 6)(x, condition), F.layer_norm(x, (8,), eps=1e-6))
    assert AdaLayerNorm(8, 6, zero=False).adaLN_modulation[1].weight.any()


def test_the_zero_block_starts_as_the_identity_and_its_gates_learn_first() -> None:
    block, x, condition = _block(), torch.randn(3, 5, 8).double(), torch.randn(3, 6).double()
    assert torch.equal(block(x, condition), x)
    block(x, condition).square().sum().backward()
    bias = block.adaLN_modulation[1].bias.grad.view(6, 8)
    assert (bias[[2, 5]] != 0).any(1).all()
    assert (bias[[0, 1, 3, 4]] == 0).all()


def test_keys_are_those_of_the_diffusion_transformer() -> None:
    block = AdaLayerNormZeroBlock(8, 6, attn=nn.Identity(), mlp=nn.Identity())
    assert set(block.state_dict()) == {
        "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
    }  # fmt: skip
    assert set(AdaLayerNormOutput(8, 6, 4).state_dict()) == {
        "linear.weight", "linear.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
    }  # fmt: skip


def test_the_output_layer_starts_at_zero_and_is_the_published_formula() -> None:
    final, x, condition = (
        AdaLayerNormOutput(8, 6, 4).double(),
        torch.randn(3, 5, 8).double(),
        torch.randn(3, 6).double(),
    )
    assert torch.equal(final(x, condition), torch.zeros(3, 5, 4).double())
    _random(final)
    linear = final.adaLN_modulation[1]
    shift, scale = F.linear(F.silu(condition), linear.weight, linear.bias)[:, None].chunk(2, dim=2)
    assert_close(final(x, condition), final.linear(F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift))


def test_refusals_name_sizes() -> None:
    layer = AdaLayerNorm(8, 6)
    with pytest.raises(ShapeError, match="features=8"):
        layer(torch.randn(2, 5, 7), torch.randn(2, 6))
    for wrong in ((2, 5), (3, 6), (2, 4, 6), (5,)):
        with pytest.raises(ShapeError, match="wanted 2x6"):
            layer(torch.randn(2, 5, 8), torch.randn(wrong))
    with pytest.raises(ShapeError, match="does not broadcast"):
        adaptive_layer_norm(torch.randn(2, 5, 8), torch.zeros(2, 7), torch.zeros(2, 7))


def test_explains_which_back_end() -> None:
    text = str(AdaLayerNorm(8, 6).explain(torch.randn(2, 5, 8), torch.randn(2, 6)))
    assert "(1 + weight)" in text
    assert "2 samples" in text
