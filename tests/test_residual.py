"""Residual branches: each placement's formula, and torch's encoder layer in both of its orders."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.activations.layer_norm import LayerNorm
from normkit.residual import Residual


class _SelfAttention(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_torchs_encoder_layer(norm_first: bool, masked: bool) -> None:
    theirs = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, norm_first=norm_first, batch_first=True, dtype=torch.float64
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    feed_forward = nn.Sequential(theirs.linear1, nn.ReLU(), theirs.linear2)
    placement = "pre" if norm_first else "post"
    norm = partial(LayerNorm, 8, dtype=torch.float64)
    first = Residual(_SelfAttention(theirs.self_attn), norm, placement)
    second = Residual(feed_forward, norm, placement)
    first.norm.load_state_dict(theirs.norm1.state_dict())
    second.norm.load_state_dict(theirs.norm2.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if masked else None
    found, wanted = second(first(x, mask=mask)), theirs(x, src_mask=mask)
    assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    (a,), (b,) = torch.autograd.grad(found.square().sum(), x), torch.autograd.grad(wanted.square().sum(), x)
    assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_each_placement_is_its_formula() -> None:
    x, f = torch.randn(4, 6, dtype=torch.float64), nn.Linear(6, 6, dtype=torch.float64)
    norm = partial(LayerNorm, 6, dtype=torch.float64)
    n = norm()
    wanted = {"pre": x + f(n(x)), "post": n(x + f(x)), "sandwich": x + n(f(n(x))), "branch": x + n(f(x))}
    for placement, value in wanted.items():
        block = Residual(f, norm, placement)
        assert_close(block(x), value, rtol=1e-12, atol=1e-12)
        assert len([m for m in block.modules() if isinstance(m, LayerNorm)]) == (2 if placement == "sandwich" else 1)
    assert "norm_after" in repr(Residual(f, norm, "sandwich"))


def test_dropout_is_on_the_branch_in_training_alone() -> None:
    block = Residual(nn.Identity(), nn.Identity, dropout=0.5)
    x = torch.ones(1000)
    y = block(x)
    assert set(y.tolist()) == {1.0, 3.0}
    assert torch.equal(block.eval()(x), 2 * x)
