"""Every method on gradients against the laws that all must keep, and against each claim on its card."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from laws import name
from normkit.catalogue import METHODS
from normkit.core.card import Card

GRADIENTS = [card for card in METHODS if card.kind == "gradient"]

each_gradient = pytest.mark.parametrize("card", GRADIENTS, ids=name)
# What acts on every backward pass until it is removed; the others act on losses, or where they are called.
each_hooked = pytest.mark.parametrize("card", [card for card in GRADIENTS if hasattr(card.module, "remove")], ids=name)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()


def backward(model: nn.Module, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    (model(torch.randn(2, 3, 5, dtype=torch.float64)).square().sum() * scale).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@each_gradient
def test_claims_of_the_card(card: Card) -> None:
    made = card.make(network())
    assert bool(made.state_dict() if isinstance(made, nn.Module) else {}) == card.running_state
    assert isinstance(made, card.module)
    assert card.functional.__name__ == card.name
    assert not card.batch_dependent
    assert card.train_equals_eval
    assert not card.foldable


@each_hooked
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_no_entry_changes_its_sign(card: Card, scale: float) -> None:
    model = network()
    plain = backward(model, scale)
    made = card.make(model)
    for found, before in zip(backward(model, scale), plain, strict=True):
        assert found.isfinite().all()
        assert_close(found.sign(), before.sign(), rtol=0, atol=0)
    made.remove()


@each_hooked
def test_zero_gradients_stay_zero(card: Card) -> None:
    model = network()
    made = card.make(model)
    assert all((gradient == 0).all() for gradient in backward(model, 0.0))
    made.remove()


@each_hooked
def test_the_forward_pass_and_the_parameters_are_left_alone(card: Card) -> None:
    model = network()
    state = copy.deepcopy(model.state_dict())
    made = card.make(model)
    backward(model)
    assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    made.remove()


@each_hooked
def test_removed_it_leaves_no_trace(card: Card) -> None:
    model = network()
    plain = backward(model)
    made = card.make(model)
    backward(model)
    made.remove()
    assert_close(backward(model), plain, rtol=0, atol=0)
