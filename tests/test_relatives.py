"""Successors of dynamic tanh and RMS normalization: where they start, their keys, their options, what they refuse."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from layer_oracles import gated_rms_norm, seed_norm
from normkit import functional as F
from normkit.core.errors import OptionError, ShapeError


def _drawn(made: Any) -> Any:
    made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
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


@pytest.mark.parametrize(
    ("made", "plain"),
    [
        (nk.SeeDNorm(6), lambda x: F.rms_norm(x, (6,), eps=1e-6)),
        (nk.DynamicTanh(6, form="erf"), lambda x: torch.erf(0.5 * x)),
        (nk.DynamicTanh(6, 0.8, form="erf", elementwise_affine=False), lambda x: torch.erf(0.8 * x)),
    ],
    ids=["seed_norm", "derf", "derf without weight"],
)
def test_starts_as(made: nn.Module, plain: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 6)
    assert_close(made(x), plain(x))


def test_holo_norm_is_undone() -> None:
    x = torch.randn(4, 6, dtype=torch.float64) * 10
    y = nk.HoloNorm(6)(x)
    assert_close(y / (1 - y.norm(dim=1, keepdim=True)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("made", "keys"),
    [
        (nk.DynamicTanh(4, form="erf"), ["alpha", "shift", "weight", "bias"]),
        (nk.SeeDNorm(4), ["weight", "alpha", "beta"]),
        (nk.GatedRMSNorm(4), ["weight"]),
        (nk.HoloNorm(4), []),
    ],
    ids=str,
)
def test_the_authors_keys(made: nn.Module, keys: list[str]) -> None:
    assert list(made.state_dict()) == keys


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nk.DynamicTanh(4, form="relu"), OptionError, "form='relu'; wanted 'tanh' or 'erf'"),
        (
            lambda: nk.SeeDNorm(6, heads=4),
            OptionError,
            "6 features do not split into heads=4; wanted one of 1, 2, 3, 6",
        ),
        (lambda: nk.SeeDNorm(6)(torch.ones(2, 5)), ShapeError, "weight has shape 6, wanted 5"),
        (lambda: nk.GatedRMSNorm(6, groups=4), OptionError, "groups=4; wanted one of 1, 2, 3, 6"),
        (
            lambda: nk.GatedRMSNorm(6)(torch.ones(2, 6), torch.ones(2, 3)),
            ShapeError,
            "got a gate of 2x3, wanted .* 2x6",
        ),
        (lambda: nk.GatedRMSNorm(6)(torch.ones(2, 5)), ShapeError, "weight has shape 6, wanted 5"),
        (lambda: nk.HoloNorm(6)(torch.ones(2, 5)), ShapeError, "features=6"),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


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
    assert [key for key in model.state_dict() if key.endswith("scale")] == [
        f"{k}.parametrizations.weight.1.scale" for k in (0, 2)
    ]
