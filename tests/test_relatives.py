"""Successors of dynamic tanh and RMS normalization: where they start, their keys, their options, what they refuse."""

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
    ids=str,
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
        (lambda: nk.SeeDNorm(6)(torch.ones(2, 5)), ShapeError, "wanted one number per feature"),
        (lambda: nk.GatedRMSNorm(6, groups=4), OptionError, "groups=4; wanted one of 1, 2, 3, 6"),
        (
            lambda: nk.GatedRMSNorm(6)(torch.ones(2, 6), torch.ones(2, 3)),
            ShapeError,
            "got a gate of 2x3, wanted .* 2x6",
        ),
        (lambda: nk.GatedRMSNorm(6)(torch.ones(2, 5)), ShapeError, "wanted one weight per feature"),
        (lambda: nk.HoloNorm(6)(torch.ones(2, 5)), ShapeError, "features=6"),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
