"""What every activation method is held to where it has the option: masks, layouts, memory of statistics, and accuracy."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from laws import call, channels_first, layer, name, roundings, sample_input
from normkit.core.card import Card
from normkit.core.errors import ShapeError
from variants import EVERY


def takes(card: Card, option: str) -> bool:
    return option in inspect.signature(card.module.__init__).parameters


def masked(card: Card) -> bool:
    """Query-key norm's mask is attention's; a convolution looks from the map's kept part at the rest."""
    return "mask" in inspect.signature(card.module.forward).parameters and card.name not in (
        "query_key_norm",
        "spatially_adaptive_norm",
    )


def statistics(made: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in made.named_buffers() if value.is_floating_point()}


def trained(card: Card, dtype: torch.dtype = torch.float64) -> Any:
    """The layer after a batch."""
    made = layer(card, dtype=dtype)
    call(card, made, sample_input(card, dtype=dtype) + 1)
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("card", [card for card in EVERY if masked(card)], ids=name)
def test_a_mask_equals_leaving_the_padding_out(card: Card, training: bool) -> None:
    made, x = trained(card).train(training), sample_input(card)
    fresh, extra, axis = copy.deepcopy(made), card.extra(x) if card.extra else (), -1 if channels_first(card) else 1
    mask = (torch.arange(5) < 3).view((1, 1, 5) if channels_first(card) else (1, 5, 1))
    padded = torch.where(mask, x, torch.nan).requires_grad_()
    found = made(padded, *extra, mask=mask)
    wanted = fresh(x.narrow(axis, 0, 3).contiguous(), *extra)
    assert_close(found.narrow(axis, 0, 3), wanted, rtol=1e-9, atol=1e-9)
    assert (found.narrow(axis, 3, 2) == 0).all()
    assert_close(made.state_dict(), fresh.state_dict(), rtol=1e-9, atol=1e-9)
    assert torch.autograd.grad(found.square().sum(), padded)[0].isfinite().all()


@pytest.mark.parametrize("card", [card for card in EVERY if takes(card, "layout")], ids=name)
def test_channels_last_layout_is_a_transposition(card: Card) -> None:
    first = trained(card)
    first.layout = "n c *"
    last, x = copy.deepcopy(first), torch.randn(8, 4, 5, 3, dtype=torch.float64)
    last.layout = "n * c"
    extra = card.extra(x) if card.extra else ()
    for training in (True, False):
        found = last.train(training)(x.movedim(1, -1).contiguous(), *extra)
        assert_close(found.movedim(-1, 1), first.train(training)(x, *extra), rtol=1e-9, atol=1e-9)
        assert found.is_contiguous()
        assert "layout" in repr(last) or "layout" in repr(first)
    assert_close(last.state_dict(), first.state_dict())


@pytest.mark.parametrize("card", EVERY, ids=name)
def test_a_large_mean_costs_no_accuracy(card: Card) -> None:
    made = card.make(4)
    x = sample_input(card, dtype=torch.float32) + 1e4
    exact = call(card, copy.deepcopy(made).double(), x.double())
    # A mean of 1e4 is known to half a unit in its last place, 1e4 * 2^-24 deviations.
    assert_close(call(card, made, x).double(), exact, rtol=1e-4 * roundings(card) / 8, atol=1e-2)


@pytest.mark.parametrize("card", [card for card in EVERY if card.running_state], ids=name)
def test_a_broken_channel_leaves_what_is_remembered_of_it(card: Card) -> None:
    made, x = trained(card), sample_input(card)
    before = statistics(made)
    x[0, (1 if channels_first(card) else slice(None)), ...] = torch.nan if channels_first(card) else x[0]
    x[..., 1] = x[..., 1] if channels_first(card) else torch.nan
    call(card, made, x)
    for key, value in statistics(made).items():
        assert value.isfinite().all(), key
        assert (value != before[key]).any(), key


@pytest.mark.parametrize("card", [card for card in EVERY if hasattr(layer(card), "reset_parameters")], ids=name)
def test_reset_layers_are_new_ones(card: Card) -> None:
    made, fresh = trained(card, torch.float32), card.make(4)
    for each in (made, fresh):
        torch.manual_seed(1)
        each.reset_parameters()
    assert_close(made.state_dict(), fresh.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("card", [card for card in EVERY if takes(card, "track_running_stats")], ids=name)
def test_tracking_turned_off_later_remembers_nothing(card: Card) -> None:
    made = trained(card)
    made.track_running_stats = False
    before = copy.deepcopy(made.state_dict())
    call(card, made, sample_input(card))
    assert_close(made.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("card", EVERY, ids=name)
def test_another_number_of_channels_is_refused(card: Card) -> None:
    made, x = layer(card), sample_input(card, 8)
    if not [p for p in made.parameters() if p.numel() > 1]:
        return  # it takes any
    with pytest.raises(ShapeError, match=r"8.*4"):
        call(card, made, x)
