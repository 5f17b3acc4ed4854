"""Every method under autocast against itself without: statistics keep the input's precision."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from laws import ACTIVATIONS, INPUTS, WEIGHTS, call, layer, name, sample_input
from normkit.core.card import Card

# These hold matrix products that are layers of the network, not statistics: autocast is meant for them.
_WHY = {
    **{
        f"layer_norm_{cell}": "its projections of input and state are the cell's linear layers"
        for cell in ("rnn", "lstm", "gru")
    },
    **dict.fromkeys(
        ("film", "adaptive_layer_norm", "adaptive_layer_norm_zero"),
        "scale and shift are the output of a linear layer on the condition",
    ),
    "spatially_adaptive_norm": "gain and shift are the output of convolutions on the map",
    "query_key_norm": "its output is that of attention, whose products autocast is meant for; the norms before it stay",
    "preconditioned_attention": "its products are attention's, which autocast is meant for",
    "fix_norm": "its output is that of a linear layer, the logits",
}

# Some roundings of sums and of the products with them, relative to the largest; a bfloat16 rounding is 2^-9 = 2e-3.
_NEAR = {"rtol": 1e-5, "atol": 1e-5}


exact = pytest.mark.parametrize("card", [card for card in ACTIVATIONS if card.name not in _WHY], ids=name)


@pytest.mark.parametrize("training", [True, False])
@exact
def test_autocast_leaves_an_activation_as_it_is(card: Card, training: bool) -> None:
    made, x = layer(card, 8, torch.float32).train(training), sample_input(card, 8, torch.float32)
    fresh = copy.deepcopy(made)
    wanted = call(card, fresh, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(card, made, x)
    assert found.dtype == torch.float32
    assert_close(found, wanted, **_NEAR)
    assert_close(made.state_dict(), fresh.state_dict(), **_NEAR)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("card", WEIGHTS, ids=name)
def test_autocast_leaves_a_weight_as_it_is(card: Card, training: bool) -> None:
    made = card.make(nn.Linear(16, 8)).train(training)
    fresh = copy.deepcopy(made)

    def weight(of: nn.Linear) -> Tensor:
        return of.weight

    with torch.autocast("cpu", torch.bfloat16):
        found = weight(made)
    assert_close(found, weight(fresh), **_NEAR)


@pytest.mark.parametrize("card", INPUTS, ids=name)
def test_autocast_leaves_an_input_as_it_is(card: Card) -> None:
    x = torch.randn(32, 4) @ torch.randn(4, 4)
    wanted = card.make(4).fit(x)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(card.make(4).fit(x)(x), wanted, **_NEAR)
