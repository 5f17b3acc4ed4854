"""Successors of dynamic tanh and RMS normalization: where they start, their keys, their options, what they refuse."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from architectures import published
from foreign_norms import random_
from layer_oracles import gated_rms_norm, seed_norm
from normkit import functional as F


def _drawn(made: Any) -> Any:
    made.double()
    random_(made)
    return made


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_seed_norm_takes_each_head_by_itself(heads: int) -> None:
    made, x = _drawn(nk.SeeDNorm(6, heads=heads)), torch.randn(2, 3, 6, dtype=torch.float64)
    parts = []
    for head in range(heads):
        part = nk.SeeDNorm(6).double()
        part.load_state_dict(made.state_dict())
        with torch.no_grad():
            keep = torch.arange(6) // (6 // heads) == head
            part.beta.mul_(keep)
        parts.append(seed_norm(part, x) * keep)
    assert_close(made(x), torch.stack(parts).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_gated_rms_norm_in_both_orders_and_in_groups(before: bool, groups: int) -> None:
    made = _drawn(nk.GatedRMSNorm(6, norm_before_gate=before, groups=groups))
    x, gate = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    assert_close(made(x, gate), gated_rms_norm(made, x, gate), rtol=1e-12, atol=1e-12)
    if groups == 1:
        assert_close(made(x), F.rms_norm(x, (6,), made.weight, made.eps), rtol=1e-12, atol=1e-12)


def test_holo_norm_is_undone() -> None:
    x = torch.randn(4, 6, dtype=torch.float64) * 10
    y = nk.HoloNorm(6)(x)
    assert_close(y / (1 - y.norm(dim=1, keepdim=True)), x, rtol=1e-12, atol=1e-12)


MODULATION = ["adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]


@pytest.mark.parametrize(
    ("made", "keys"),
    [
        (nk.DynamicTanh(4), ["alpha", "weight", "bias"]),
        (nk.DynamicTanh(4, bias=False), ["alpha", "weight"]),
        (nk.DynamicTanh(4, elementwise_affine=False), ["alpha"]),
        (nk.DynamicTanh(4, form="erf"), ["alpha", "shift", "weight", "bias"]),
        (nk.FilterResponseNorm(4), ["weight", "bias", "tau"]),
        (nk.SeeDNorm(4), ["weight", "alpha", "beta"]),
        (nk.GatedRMSNorm(4), ["weight"]),
        (nk.HoloNorm(4), []),
        (nk.QueryKeyNorm(4, length=3), ["q_norm.weight"]),
        (nk.MeanOnlyBatchNorm(3), ["bias", "running_mean", "num_batches_tracked"]),
        (nk.AdaLayerNormZeroBlock(8, 6, attn=nn.Tanh(), mlp=nn.Tanh()), MODULATION),
        (nk.AdaLayerNormOutput(8, 6, 4), ["linear.weight", "linear.bias", *MODULATION]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_authors_keys(made: nn.Module, keys: list[str]) -> None:
    assert sorted(made.state_dict()) == sorted(keys)


@pytest.mark.parametrize("mode", ["row", "col", "rowcol"])
def test_a_learned_gain_of_weight_conditioning(mode: str) -> None:
    plain, x = nn.Linear(5, 4).double(), torch.randn(3, 5, dtype=torch.float64)
    made = nk.weights.weight_conditioning(copy.deepcopy(plain), mode, gain="learned")
    other = nk.weights.weight_conditioning(copy.deepcopy(plain), mode, gain=2.5)
    raw, temperature = made.parametrizations.weight.original, made.parametrizations.weight[1]
    assert_close(made(x), nk.weights.weight_conditioning(copy.deepcopy(plain), mode)(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        temperature.scale.fill_(2.5)
    assert_close(made(x), other(x), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(made(x).square().sum(), [raw, temperature.scale])
    theirs = torch.autograd.grad(other(x).square().sum(), [other.parametrizations.weight.original])
    assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-12)
    assert_close(ours[1], (made(x) - made.bias).mul(2 * made(x)).sum() / 2.5, rtol=1e-9, atol=1e-12)
    weight = made.weight.detach().clone()
    made.weight = weight
    if mode == "row":
        assert_close(made.weight, weight, rtol=1e-12, atol=1e-12)
    wanted = made(x)
    nk.fold(made)
    assert type(made) is nn.Linear
    assert_close(made(x), wanted)


def test_a_recipe_with_a_learned_gain() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    changes = nk.apply_recipe(model, "keep + e:row:learned@all")
    assert [row.after for row in changes] == ["weight_conditioning:row:learned"] * 2
    scales = [f"{k}.parametrizations.weight.1.scale" for k in (0, 2)]
    assert [key for key in model.state_dict() if key.endswith("scale")] == scales


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), 1),
    "conv, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), 2),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), 2),
}


def _matrices(layer: Any, weight: Tensor, groups: int) -> list[Tensor]:
    """One matrix per group, output units in rows."""
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    parts = weight.chunk(groups)
    return [part.movedim(axis, 0).flatten(1) for part in parts]


@pytest.mark.parametrize("make", LAYERS, ids=str)
@pytest.mark.parametrize("gradient", ["full", "detach"])
def test_preconditioners_from_both_sides(make: str, gradient: Any) -> None:
    build, groups = LAYERS[make]
    layer = build().double()
    raw = layer.weight.detach().clone()
    whole = _matrices(layer, raw, groups)
    m = len(whole[0])
    fixed = torch.randn(m, m, dtype=torch.float64)

    def columns(a: Tensor) -> Tensor:
        return 1 / a.square().sum(-2).sqrt()

    made = nk.weights.precondition(layer, fixed, columns, gradient=gradient)
    wanted = [fixed @ a @ torch.diag(columns(a)) for a in whole]
    for found, a in zip(_matrices(made, made.weight, groups), wanted, strict=True):
        assert_close(found, a, rtol=1e-12, atol=1e-12)
    assert "parametrizations.weight.0.left" in made.state_dict()
    g = torch.randn_like(raw)
    (found,) = torch.autograd.grad(made.weight, made.parametrizations.weight.original, g)
    leaves = [a.clone().requires_grad_() for a in whole]
    frozen = [columns(a.detach() if gradient == "detach" else a) for a in leaves]
    parts = zip(leaves, frozen, _matrices(layer, g, groups), strict=True)
    total = sum((fixed @ a @ torch.diag(p) * b).sum() for a, p, b in parts)
    for one, other in zip(_matrices(made, found, groups), torch.autograd.grad(total, leaves), strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)
    value = made.weight.detach().clone()
    nk.fold(nn.Sequential(made))
    assert type(made) is type(build())
    assert_close(made.weight, value, rtol=0, atol=0)


def test_symmetric_jacobi_of_a_positive_matrix() -> None:
    # The bound of van der Sluis: at most n times the best condition number of all symmetric scalings.
    scale = torch.logspace(-2, 2, 6, dtype=torch.float64)
    root = torch.randn(6, 6, dtype=torch.float64)
    good = root @ root.T + 6 * torch.eye(6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    model[0].weight.data = scale[:, None] * good * scale
    changes = nk.condition(model, "symmetric_jacobi", "all")
    assert [row.after for row in changes] == ["preconditioning:jacobi"]
    assert_close(model[0].weight.diagonal(), torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.linalg.cond(model[0].weight) <= 6 * torch.linalg.cond(good)
    changes.undo()
    other = nk.apply_recipe(nn.Sequential(nn.Linear(6, 6)), "keep+preconditioning:jacobi")
    assert [row.after for row in other] == ["preconditioning:jacobi"]


def test_conditioning_by_preconditioners_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    wanted = [2 * model[k].weight.detach().clone() for k in (0, 2)]
    nk.condition(model, left=lambda a: 2 * torch.ones(a.shape[:-1], dtype=a.dtype))
    assert_close([model[0].weight.detach(), model[2].weight.detach()], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("separate", [False, True])
def test_spectral_conditioning_of_torchs_attention(separate: bool) -> None:
    sizes = {"kdim": 4, "vdim": 5} if separate else {}
    attention = nn.MultiheadAttention(6, 2, batch_first=True, **sizes)
    model, x = nn.ModuleDict({"attention": attention}).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    inputs = (x, torch.randn(2, 3, 4).double(), torch.randn(2, 3, 5).double()) if separate else (x, x, x)
    plain = copy.deepcopy(attention)
    with torch.no_grad():
        if separate:
            for weight in (plain.q_proj_weight, plain.k_proj_weight, plain.v_proj_weight):
                weight.add_(3.0 * torch.eye(*weight.shape))
        else:
            plain.in_proj_weight.add_(3.0 * torch.eye(6).repeat(3, 1))
    changes = nk.condition(model, "spectral", shift=3.0)
    assert {row.after for row in changes} == {"spectral_conditioning"}
    assert len(changes) == (3 if separate else 1)
    assert_close(attention(*inputs)[0], plain(*inputs)[0], rtol=1e-12, atol=1e-12)
    nk.fold(model)
    assert_close(attention(*inputs)[0], plain(*inputs)[0], rtol=1e-12, atol=1e-12)


ATTENTION = {"BertModel": "query key value", "GPT2Model": "c_attn", "LlamaModel": "q_proj k_proj v_proj"}


@pytest.mark.parametrize(("kind", "names"), ATTENTION.items(), ids=ATTENTION)
def test_spectral_conditioning_of_language_models(kind: str, names: str) -> None:
    pytest.importorskip("transformers", reason="its models are what is conditioned")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    extra = {"num_key_value_heads": 1} if kind == "LlamaModel" else {}
    model = published(kind, **sizes, vocab_size=11, **extra).eval()
    before = {
        name: m.weight.detach().clone() for name, m in model.named_modules() if name.endswith(tuple(names.split()))
    }
    changes = nk.apply_recipe(model, "keep+sc")
    assert sorted(row.layer for row in changes) == sorted(before)
    assert len(before) == len(names.split())
    for name, old in before.items():
        eye = torch.eye(8, 8).repeat(1, 3) if kind == "GPT2Model" else torch.eye(*old.shape)
        assert_close(model.get_submodule(name).weight, old + 10 * eye)
    tokens = torch.arange(6)[None]
    wanted = model(tokens).last_hidden_state
    nk.fold(model)
    assert_close(model(tokens).last_hidden_state, wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_conditioned_tokens_bound_the_condition_number(length: int, features: int, seed: int) -> None:
    x = torch.randn(2, length, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y, least = nk.ConditionedTokens()(x), min(length, features)
    before, after = torch.linalg.svdvals(x), torch.linalg.svdvals(y)
    assert_close(after, before + before[:, :1], rtol=1e-12, atol=1e-12)
    assert (after[:, 0] <= 2 * after[:, least - 1] * (1 + 1e-12)).all()


def test_gradients_of_conditioned_tokens() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    assert_close(torch.autograd.grad(nk.ConditionedTokens()(x), x, g)[0], g, rtol=0, atol=0)
    torch.autograd.gradcheck(nk.ConditionedTokens("full"), x)


def test_gradients_and_masks_of_preconditioned_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    rows = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    norms = rows.square().sum(-1, keepdim=True).sqrt()
    for gradient, wanted in (("full", rows / norms), ("detach", rows / norms.detach())):
        made = nk.PreconditionedAttention(gradient=gradient)
        assert_close(made(q, k, v, mask), wanted, rtol=1e-12, atol=1e-12)
        assert_close(made(q, k, v, is_causal=True), wanted, rtol=1e-12, atol=1e-12)
        both = (made(q, k, v, mask), wanted)
        found, other = (torch.autograd.grad(y.sin().sum(), (q, k, v), retain_graph=True) for y in both)
        assert_close(found, other, rtol=1e-10, atol=1e-12)
