"""Query-key normalization: the published form, the modern forms, masks and heads."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from normkit.activations.query_key_norm import QueryKeyNorm, query_key_norm
from normkit.core.errors import OptionError, ShapeError


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two samples, three heads, five queries, seven keys of eight features, values of four."""
    shapes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    q, k, v = (torch.randn(shape, dtype=torch.float64) * 3 for shape in shapes)
    return q, k, v


def test_the_cosine_form_is_the_published_formula() -> None:
    q, k, v = qkv()
    attention = QueryKeyNorm(8, length=20).double()
    gain = attention.q_norm.weight.item()
    assert gain == pytest.approx(math.log2(20**2 - 20))
    logits = gain * F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    assert_close(attention(q, k, v), logits.softmax(-1) @ v, rtol=1e-9, atol=1e-9)
    assert list(attention.state_dict()) == ["q_norm.weight"]


@pytest.mark.parametrize("form", ["rms", "layer"])
def test_the_modern_forms_are_the_norms_and_then_attention(form: str) -> None:
    q, k, v = qkv()
    attention = QueryKeyNorm(8, form).double()
    theirs = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[form]
    q_norm, k_norm = theirs(8, eps=1e-6).double(), theirs(8, eps=1e-6).double()
    for parameter in [*q_norm.parameters(), *k_norm.parameters()]:
        nn.init.normal_(parameter)
    pair = nn.ModuleDict({"q_norm": q_norm, "k_norm": k_norm})
    attention.load_state_dict(pair.state_dict(), strict=True)
    wanted = F.scaled_dot_product_attention(q_norm(q), k_norm(k), v)
    assert_close(attention(q, k, v), wanted, rtol=1e-9, atol=1e-9)
    biases = [getattr(norm, "bias", None) for norm in (q_norm, k_norm)]
    found = query_key_norm(q, k, q_norm.weight, k_norm.weight, *biases, form=form)
    assert_close(found, (q_norm(q), k_norm(k)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["cosine", "rms", "layer"])
def test_masks_and_causality(form: str) -> None:
    q, k, v = qkv()
    k, v = k[..., :5, :], v[..., :5, :]
    attention = QueryKeyNorm(8, form, length=20 if form == "cosine" else None).double()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    assert_close(attention(q, k, v, is_causal=True), attention(q, k, v, causal))
    keep = torch.arange(5) < 3
    assert_close(attention(q, k, v, keep.expand(5, 5)), attention(q, k[..., :3, :], v[..., :3, :]))
    a, b = attention.normalize(q, k)
    assert_close(attention(q, k, v), F.scaled_dot_product_attention(a, b, v, scale=attention.scale))


def test_cosine_logits_are_bounded_by_the_gain() -> None:
    attention = QueryKeyNorm(8, length=20)
    q, k = attention.normalize(torch.randn(4, 8) * 1e6, torch.randn(4, 8) * 1e-3)
    assert (q @ k.T).abs().max().item() <= attention.q_norm.weight.item() * (1 + 1e-6)


def test_dropout_is_for_training_alone() -> None:
    q, k, v = qkv()
    attention = QueryKeyNorm(8, length=20).double()
    exact = attention(q, k, v)
    assert not torch.allclose(attention(q, k, v, dropout=0.5), exact)
    assert_close(attention.eval()(q, k, v, dropout=0.5), exact)


def test_refusals() -> None:
    for wrong in ({"length": None}, {"length": 1}, {"form": "rms", "length": 10}):
        with pytest.raises(OptionError, match="length of at least 2"):
            QueryKeyNorm(8, **wrong)
    with pytest.raises(OptionError, match="form='l2'"):
        QueryKeyNorm(8, form="l2")
    with pytest.raises(ShapeError, match="features=8"):
        QueryKeyNorm(8, "rms")(*[torch.randn(2, 5, 24)] * 3)
