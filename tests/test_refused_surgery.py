"""What would go wrong silently in placed, adopted and converted models is refused, or forgotten where it is stale."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.core.errors import NormkitError
from normkit.surgery import adopt, place_norms, translate


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def hinted() -> Any:
    model = encoder()
    place_norms(model, "hybrid")
    return model(torch.randn(1, 4, 8), is_causal=True)


def parametrized() -> Any:
    model = encoder()
    nn.utils.parametrizations.weight_norm(model.layers[0].linear1)
    return place_norms(model, "deep")


def packed() -> Any:
    model = nn.Sequential(nn.LSTM(4, 6, batch_first=True))
    nk.convert(model, "layer_norm_lstm")
    return model(nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 4), [5, 3], batch_first=True))


def batched() -> Any:
    return nk.condition(nn.Conv2d(4, 8, 1, groups=2), left=torch.ones(2, 4, 4), where="all")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (batched, r"left of a matrix of 2x4x2 is of 2x4x4; wanted 4, a diagonal, or 4x4; one tensor serves all groups"),
        (hinted, "give the mask"),
        (parametrized, "put those on afterwards"),
        (packed, "pad_packed_sequence"),
        (lambda: adopt(nn.Sequential(nn.BatchNorm1d(3)), "keras", momentum=5.0), "from 0 to 1"),
        (lambda: adopt(nn.Sequential(nn.LayerNorm(4)), "keras", eps=-1.0), "eps from 0"),
        (lambda: translate({"params/kernel": torch.ones(2, 2, 3)}, nn.Linear(6, 3), source="flax"), "flatten it"),
    ],
)
def test_what_would_go_wrong_is_refused(act: Callable[[], Any], said: str) -> None:
    with pytest.raises(NormkitError, match=said):
        act()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_waiting_moments_follow_a_move(dtype: torch.dtype) -> None:
    norm, x = nk.BatchNorm(2, accumulate=2, momentum=1.0), torch.randn(8, 2)
    norm(x[:4])
    norm.to(dtype)(x[4:].to(dtype))
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, x.mean(0).to(dtype))  # the first half was summed in float32
    norm(x[:4].to(dtype))
    norm.to("meta")(x[4:].to("meta", dtype))


@pytest.mark.parametrize("how", ["load", "accumulate"])
def test_waiting_moments_do_not_outlive_their_group(how: str) -> None:
    norm = nk.BatchNorm(2, accumulate=2, momentum=1.0)
    norm(torch.full((8, 2), 100.0) + torch.randn(8, 2))
    if how == "load":
        norm.load_state_dict(nk.BatchNorm(2).state_dict())
    else:
        norm.accumulate = 1
        norm(torch.randn(8, 2))
        norm.accumulate = 2
    norm(torch.randn(8, 2))
    norm(torch.randn(8, 2))
    assert norm.running_mean is not None
    assert norm.running_mean.abs().max() < 10
