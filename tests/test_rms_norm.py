"""RMSNorm's published forms: where eps stands, what the weight is counted from, when a half type is rounded."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.rms_norm import RMSNorm, rms_norm
from normkit.engine.library import library

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
    assert_close(
        torch.autograd.grad((found * direction).sum(), [a, *ours.parameters()]),
        torch.autograd.grad((wanted * direction).sum(), [b, *theirs.parameters()]),
        rtol=1e-5,  # sums of 28 products in another order
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LlamaRMSNorm", "T5LayerNorm"])
def test_equals_transformers_in_half_types(name: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(name, dtype)
    x = (torch.randn(64, 96) * 3 + 1).to(dtype)
    # The kernel rounds 1 / rms once, from double; theirs twice, in float32. So now and then a value falls to its neighbour, and
    # the weight may double that.
    eps = torch.finfo(dtype).eps
    assert_close(ours(x), theirs(x), rtol=2 * eps, atol=0)
    assert (ours(x) == theirs(x)).double().mean() > 0.99
    # A float32 weight with a half input: theirs leaves float32, ours keeps the input's dtype.
    ours, theirs = twins(name, torch.float32)
    if name == "LlamaRMSNorm":
        assert_close(ours(x), theirs(x).to(dtype), rtol=2 * eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equals_gemma_in_half_types_to_the_last_place(dtype: torch.dtype) -> None:
    ours, theirs = twins("GemmaRMSNorm", dtype)
    x = (torch.randn(64, 96) * 3 + 1).to(dtype)
    # The mean square is summed in another order, so now and then the one rounding at the end falls to the neighbour.
    eps = torch.finfo(dtype).eps
    assert_close(ours(x), theirs(x), rtol=eps, atol=0)
    assert (ours(x) == theirs(x)).double().mean() > 0.99


def test_the_order_of_the_cast_matters_only_in_half_types() -> None:
    weight = torch.rand(96) + 0.5
    for dtype, same in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False)):
        x, w = torch.randn(64, 96).to(dtype), weight.to(dtype)
        early = rms_norm(x, 96, w, cast="before weight")
        late = rms_norm(x, 96, w, cast="after weight")
        assert early.dtype == late.dtype == dtype
        if same:
            assert_close(early, late)
        else:
            assert not torch.equal(early, late)
        # Each order as it is written out.
        wide = x if dtype == torch.float64 else x.float()
        normalized = wide * (wide.square().mean(-1, keepdim=True) + torch.finfo(wide.dtype).eps).rsqrt()
        assert_close(early, normalized.to(dtype) * w)
        assert_close(late, (normalized * w.to(wide.dtype)).to(dtype))


@pytest.mark.parametrize("guard", ["inside", "outside", "floor"])
def test_where_eps_stands(guard: str) -> None:
    x, eps = torch.randn(5, 8, dtype=torch.float64) * 0.3, 0.25
    square = x.square().mean(-1, keepdim=True)
    scale = {"inside": (square + eps).sqrt(), "outside": square.sqrt() + eps, "floor": square.sqrt().clamp_min(eps)}
    weight, bias = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    for offset in (0.0, 1.0):
        wanted = (offset + weight) * x / scale[guard] + bias
        for cast in ("after weight", "before weight"):
            found = rms_norm(x, 8, weight, eps, bias=bias, guard=guard, offset=offset, cast=cast)
            assert_close(found, wanted, rtol=1e-12, atol=1e-12)
            made = RMSNorm(8, eps, guard=guard, offset=offset, cast=cast, bias=True, dtype=torch.float64)
            assert_close(made(x), x / scale[guard], rtol=1e-12, atol=1e-12)
            with torch.no_grad():
                made.weight.copy_(weight)
                made.bias.copy_(bias)
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
