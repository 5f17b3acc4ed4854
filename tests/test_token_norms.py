"""What normalizations of a token by itself equal, where they start, and RMSNorm's published forms."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit import FixNorm, LearnedScale, QueryKeyNorm, RMSNorm, ScaleNorm
from normkit.engine.library import library
from normkit.functional import fix_norm, hypersphere, hypersphere_residual, rms_norm, scale_norm


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


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two samples, three heads, five queries, seven keys of eight features, values of four."""
    shapes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    q, k, v = (torch.randn(shape, dtype=torch.float64) * 3 for shape in shapes)
    return q, k, v


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
    found = nk.functional.query_key_norm(q, k, q_norm.weight, k_norm.weight, *biases, form=form)
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


def test_the_cosine_forms_gain_starts_by_the_length_and_dropout_is_for_training_alone() -> None:
    q, k, v = qkv()
    attention = QueryKeyNorm(8, length=20).double()
    assert attention.q_norm.weight.item() == pytest.approx(math.log2(20**2 - 20))
    exact = attention(q, k, v)
    assert not torch.allclose(attention(q, k, v, dropout=0.5), exact)
    assert_close(attention.eval()(q, k, v, dropout=0.5), exact)


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
    nk.functional.renormalize_(reads=[model["words"], model["up"]], writes=[model["down"]])
    for name, dim in (("words", 1), ("up", 1), ("down", 0)):
        weight = model[name].weight
        assert weight.requires_grad
        assert_close(weight, before[name] / before[name].norm(dim=dim, keepdim=True))


# RMSNorm's published forms: where eps stands, what the weight is counted from, when a half type is rounded

FORMS: dict[str, dict[str, Any]] = {
    "LlamaRMSNorm": {"eps": 1e-6, "cast": "before weight"},
    "T5LayerNorm": {"eps": 1e-6, "cast": "before weight"},
    "GemmaRMSNorm": {"eps": 1e-6, "offset": 1.0},
}


def published(name: str) -> type[nn.Module]:
    pytest.importorskip("transformers", reason="the published classes are in transformers")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return {"LlamaRMSNorm": LlamaRMSNorm, "T5LayerNorm": T5LayerNorm, "GemmaRMSNorm": GemmaRMSNorm}[name]


def twins(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    theirs = published(name)(96)
    with torch.no_grad():
        theirs.weight.add_(torch.randn(96) * 0.3)
    theirs = theirs.to(dtype)
    ours = RMSNorm(96, **FORMS[name], dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("name", FORMS)
def test_equals_transformers_in_float32_with_gradients(name: str) -> None:
    ours, theirs = twins(name, torch.float32)
    assert_close(RMSNorm(96, **FORMS[name]).weight, published(name)(96).weight, rtol=0, atol=0)
    x, direction = torch.randn(4, 7, 96), torch.randn(4, 7, 96)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = ours(a), theirs(b)
    assert_close(found, wanted)
    gradients = torch.autograd.grad(found, [a, *ours.parameters()], direction)
    # Sums of 28 products in another order.
    assert_close(gradients, torch.autograd.grad(wanted, [b, *theirs.parameters()], direction), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_equals_transformers_in_half_types(name: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(name, dtype)
    x = (torch.randn(64, 96) * 3 + 1).to(dtype)
    # The kernel rounds 1 / rms once, from double; theirs twice, in float32. So now and then a value falls to its neighbour, and
    # the weight may double that; Gemma's is rounded once, at the end.
    eps = torch.finfo(dtype).eps
    assert_close(ours(x), theirs(x), rtol=eps if name == "GemmaRMSNorm" else 2 * eps, atol=0)
    assert (ours(x) == theirs(x)).double().mean() > 0.99
    # A float32 weight with a half input: theirs leaves float32, ours keeps the input's dtype.
    ours, theirs = twins(name, torch.float32)
    if name == "LlamaRMSNorm":
        assert_close(ours(x), theirs(x).to(dtype), rtol=2 * eps, atol=0)


def test_the_order_of_the_cast_matters_only_in_half_types() -> None:
    weight = torch.rand(96) + 0.5
    for dtype, same in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False)):
        x, w = torch.randn(64, 96).to(dtype), weight.to(dtype)
        early, late = (rms_norm(x, 96, w, cast=f"{when} weight") for when in ("before", "after"))  # pyright: ignore
        assert early.dtype == late.dtype == dtype
        assert torch.allclose(early, late) if same else not torch.equal(early, late)
        # Each order as it is written out.
        wide = x if dtype == torch.float64 else x.float()
        normalized = wide * (wide.square().mean(-1, keepdim=True) + torch.finfo(wide.dtype).eps).rsqrt()
        assert_close(early, normalized.to(dtype) * w)
        assert_close(late, (normalized * w.to(wide.dtype)).to(dtype))


@pytest.mark.parametrize("guard", ["inside", "outside", "floor"])
def test_where_eps_stands(guard: str) -> None:
    x, eps, (weight, bias) = torch.randn(5, 8).double() * 0.3, 0.25, torch.randn(2, 8).double()
    square = x.square().mean(-1, keepdim=True)
    scale = {"inside": (square + eps).sqrt(), "outside": square.sqrt() + eps, "floor": square.sqrt().clamp_min(eps)}
    for offset, cast in product((0.0, 1.0), ("after weight", "before weight")):
        wanted = (offset + weight) * x / scale[guard] + bias
        options = {"guard": guard, "offset": offset, "cast": cast}
        assert_close(rms_norm(x, 8, weight, eps, bias=bias, **options), wanted, rtol=1e-12, atol=1e-12)
        made = RMSNorm(8, eps, **options, bias=True, dtype=torch.float64)
        assert_close(made(x), x / scale[guard], rtol=1e-12, atol=1e-12)
        made.load_state_dict({"weight": weight, "bias": bias})
        assert_close(made(x), wanted, rtol=1e-12, atol=1e-12)


def test_large_values_overflow_only_where_their_squares_do() -> None:
    assert rms_norm(torch.full((1, 4), 1e18), 4).eq(1).all()
    assert rms_norm(torch.full((1, 4), 3e4, dtype=torch.float16), 4).eq(1).all()  # its square is beyond float16
    # 1e60 is beyond float32: the definition gives 0, as torch does; the kernels take such squares in double.
    assert rms_norm(torch.full((1, 4), 1e30), 4, backend="reference").eq(0).all()
    if library() is not None:
        assert rms_norm(torch.full((1, 4), 1e30), 4).eq(1).all()
    assert_close(rms_norm(torch.full((1, 4), 1e30, dtype=torch.float64), 4), torch.ones(1, 4, dtype=torch.float64))


def test_says_what_it_is() -> None:
    assert repr(RMSNorm(4)) == "RMSNorm((4,), eps=None, elementwise_affine=True)"
    assert "offset=1.0" in repr(RMSNorm(4, offset=1.0))
    assert "cast='before weight'" in repr(RMSNorm(4, cast="before weight"))
