"""What normalizations of a token by itself equal, and where they start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from normkit import FixNorm, LearnedScale, QueryKeyNorm, ScaleNorm
from normkit.functional import (
    fix_norm,
    hypersphere,
    hypersphere_residual,
    partial_rms_norm,
    query_key_norm,
    renormalize_,
    rms_norm,
    scale_norm,
)

# Partial RMS normalization


@pytest.mark.parametrize("guard", ["inside", "outside", "floor"])
def test_all_features_are_rms_norm(guard: str) -> None:
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = partial_rms_norm(x, 1.0, weight, eps=0.1, guard=guard)
    assert_close(found, rms_norm(x, 6, weight, 0.1, guard=guard), rtol=1e-12, atol=1e-12)


# ScaleNorm


def test_eps_is_a_floor_of_the_norm() -> None:
    tiny = torch.full((1, 4), 1e-7, dtype=torch.float64)
    assert_close(scale_norm(tiny), tiny / 1e-5)
    for value in (0.0, 1e-7):
        x = torch.full((1, 4), value, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(scale_norm(x).sum(), x)
        assert_close(gradient, torch.full((1, 4), 1e5, dtype=torch.float64))


def test_one_scalar_may_be_shared_by_all_places() -> None:
    first = ScaleNorm(8)
    model = nn.Sequential(first, ScaleNorm(8, weight=first.weight), ScaleNorm(8))
    assert len(list(model.parameters())) == 2
    model(torch.randn(3, 8)).sum().backward()
    fresh = ScaleNorm(8)
    other = nn.Sequential(fresh, ScaleNorm(8, weight=fresh.weight), ScaleNorm(8))
    other.load_state_dict(model.state_dict())


# FixNorm


@pytest.mark.parametrize("fix_embeddings", [True, False])
@pytest.mark.parametrize("fix_output", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fix_norm_in_all_its_readings(fix_embeddings: bool, fix_output: bool, bias: bool) -> None:
    words = FixNorm(6, 11, fix_embeddings=fix_embeddings, fix_output=fix_output, bias=bias).double()
    assert (words.gain is None) == (not fix_output)
    with torch.no_grad():
        words.weight.copy_(torch.randn(11, 6))
        if fix_output:
            words.gain.fill_(3.0)
        if bias:
            words.bias.copy_(torch.randn(11))
    h, tokens = torch.randn(2, 5, 6, dtype=torch.float64), torch.randint(11, (2, 5))
    e = F.normalize(words.weight, dim=-1) if fix_embeddings else words.weight
    wanted = (3 * F.normalize(h, dim=-1) if fix_output else h) @ e.T + (words.bias if bias else 0)
    assert_close(words(h), wanted, rtol=1e-12, atol=1e-12)
    assert_close(words.embed(tokens), e[tokens] * 6**0.5, rtol=1e-12, atol=1e-12)


def test_fix_norm_starts_as_published() -> None:
    words = FixNorm(64, 500)
    assert words.weight.abs().max() <= 0.01
    assert words.gain.item() == 8
    assert_close(words.embed(torch.arange(500)).norm(dim=-1), torch.full((500,), 8.0))
    assert words(torch.randn(3, 64)).abs().max() <= 8 + 1e-5
    plain = FixNorm(64, 500, fix_embeddings=False)
    assert_close(plain.weight.std().item(), 1 / 8, rtol=0.05, atol=0)  # of 32,000 draws


def test_a_word_of_zeros_and_a_token_of_zeros_are_harmless() -> None:
    weight = torch.zeros(2, 4, requires_grad=True)
    x = torch.zeros(1, 4, requires_grad=True)
    y = fix_norm(x, weight, gain=torch.tensor(2.0))
    assert torch.equal(y, torch.zeros(1, 2))
    y.sum().backward()
    assert weight.grad.isfinite().all()
    assert x.grad.isfinite().all()


# Query-key normalization


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two samples, three heads, five queries, seven keys of eight features, values of four."""
    shapes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    q, k, v = (torch.randn(shape, dtype=torch.float64) * 3 for shape in shapes)
    return q, k, v


def test_the_cosine_forms_gain_starts_by_the_length() -> None:
    attention = QueryKeyNorm(8, length=20)
    assert attention.q_norm.weight.item() == pytest.approx(math.log2(20**2 - 20))
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


def test_dropout_is_for_training_alone() -> None:
    q, k, v = qkv()
    attention = QueryKeyNorm(8, length=20).double()
    exact = attention(q, k, v)
    assert not torch.allclose(attention(q, k, v, dropout=0.5), exact)
    assert_close(attention.eval()(q, k, v, dropout=0.5), exact)


# The normalized transformer's parts


def test_extreme_rates() -> None:
    h, branch = hypersphere(torch.randn(5, 16).double()), torch.randn(5, 16).double()
    assert_close(hypersphere_residual(h, branch, 0.0), h, rtol=1e-12, atol=1e-12)
    assert_close(hypersphere_residual(h, branch, 1.0), hypersphere(branch), rtol=1e-12, atol=1e-12)
    assert_close(hypersphere_residual(h, torch.zeros_like(h), 0.05), h, rtol=1e-12, atol=1e-12)


def test_a_scale_moves_by_its_start_over_its_unit() -> None:
    plain, scaled = LearnedScale(4, start=0.05), LearnedScale(4, start=0.05, unit=1 / math.sqrt(256))
    for layer in (plain, scaled):
        assert_close(layer.scale, torch.full((4,), 0.05))
        with torch.no_grad():
            layer.weight.add_(0.01)
    assert_close(scaled.scale - 0.05, 16 * (plain.scale - 0.05))
    assert scaled(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_weights_go_back_to_the_sphere_after_a_step() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(11, 8), "up": nn.Linear(8, 20), "down": nn.Linear(20, 8)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model["down"](model["up"](model["words"](torch.arange(11)))).square().sum().backward()
    optimizer.step()
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    renormalize_(reads=[model["words"], model["up"]], writes=[model["down"]])
    for name, dim in (("words", 1), ("up", 1), ("down", 0)):
        weight = model[name].weight
        assert weight.requires_grad
        assert_close(weight, before[name] / before[name].norm(dim=dim, keepdim=True))
