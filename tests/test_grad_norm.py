"""Methods on gradients: the laws that all must keep, each claim on a card, and GradNorm by its formula."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from laws import name
from normkit.catalogue import METHODS
from normkit.core.card import Card
from normkit.gradients.grad_norm import GradNorm, grad_norm

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
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_no_entry_changes_its_sign_nor_a_parameter_and_removed_it_leaves_no_trace(card: Card, scale: float) -> None:
    model = network()
    plain, state = backward(model, scale), copy.deepcopy(model.state_dict())
    made = card.make(model)
    for found, before in zip(backward(model, scale), plain, strict=True):
        assert found.isfinite().all()
        assert_close(found.sign(), before.sign(), rtol=0, atol=0)
    assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    made.remove()
    assert_close(backward(model, scale), plain, rtol=0, atol=0)


class Tasks(nn.Module):
    """A shared layer and a head a task, on regressions of unlike scales."""

    def __init__(self, scales: tuple[float, ...] = (1.0, 3.0, 10.0)) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 8, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(8, 2, dtype=torch.float64) for _ in scales)
        self.scales = scales

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.shared(x).tanh()
        pairs = zip(self.heads, self.scales, strict=True)
        return [(head(h) - scale * x[:, :2].sin()).square().mean() for head, scale in pairs]


def x() -> Tensor:
    return torch.randn(16, 6, dtype=torch.float64)


@given(weights=st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3), alpha=st.sampled_from([0.0, 0.5, 1.5, 3.0]))
def test_both_paths_agree_and_are_the_definition(weights: list[float], alpha: float) -> None:
    model = Tasks()
    losses, w = model(x()), torch.tensor(weights, dtype=torch.float64)
    initial = torch.tensor([2.0, 30.0, 100.0], dtype=torch.float64)
    exact = grad_norm(losses, model.shared.parameters(), w, initial, alpha)
    auto = grad_norm(losses, model.shared.parameters(), w, initial, alpha, path="autograd")
    assert_close(exact, auto, rtol=1e-9, atol=1e-12)
    norms = []
    for weight, loss in zip(weights, losses, strict=True):
        model.zero_grad()
        (weight * loss).backward(retain_graph=True)
        norms.append(torch.cat([p.grad.flatten() for p in model.shared.parameters()]).norm())
    pace = torch.stack(losses).detach() / initial
    assert_close(exact.norms, torch.stack(norms))
    assert_close(exact.targets, torch.stack(norms).mean() * (pace / pace.mean()) ** alpha)


@pytest.mark.parametrize("step", ["additive", "multiplicative"])
def test_one_step_is_the_formula(step: Any) -> None:
    model, z = Tasks(), x()
    balance = GradNorm(3, alpha=0.5, rate=0.01, step=step).double()
    balance(model(z), model.shared.weight)
    first = balance.initial.clone()
    model.shared.weight.data.mul_(1.3)
    before = balance.weights.clone()
    found = grad_norm(model(z), model.shared.weight, before, first, 0.5)
    total = balance(model(z), model.shared.weight)
    assert_close(total, (before * torch.stack(model(z))).sum())
    if step == "additive":
        wanted = before - 0.01 * found.slopes
    else:
        wanted = before * torch.exp(-0.01 * found.slopes * before / found.norms.mean())
    assert_close(balance.weights, wanted * 3 / wanted.sum())
    assert_close(balance.initial, first, rtol=0, atol=0)


def test_slow_tasks_get_the_larger_target() -> None:
    w = nn.Parameter(torch.ones(1))
    found = grad_norm([w.sum(), w.sum()], w, torch.ones(2), torch.tensor([1.0, 4.0]), alpha=1.0)
    assert found.targets[0] > found.targets[1]  # the first is where it began, the second at a quarter
    assert_close(found.slopes, torch.tensor([-1.0, 1.0]))
    even = grad_norm([w.sum(), w.sum()], w, torch.ones(2), torch.tensor([1.0, 4.0]), alpha=0.0)
    assert_close(even.targets, torch.ones(2))


def test_without_a_restoring_force_norms_become_equal() -> None:
    model, z = Tasks(), x()
    balance = GradNorm(3, alpha=0.0, rate=0.05, step="multiplicative").double()
    for _ in range(300):
        balance(model(z), model.shared.weight)
    norms = grad_norm(model(z), model.shared.weight, balance.weights, balance.initial, 0.0).norms
    assert_close(norms / norms.mean(), torch.ones(3).double(), rtol=0.1, atol=0)  # steps of 5 % do not come nearer
    assert_close(balance.weights.sum(), torch.tensor(3.0).double())


@pytest.mark.parametrize("path", ["exact", "autograd"])
@pytest.mark.parametrize("step", ["additive", "multiplicative"])
def test_in_a_training_loop_with_weights_that_sum_to_the_tasks(path: Any, step: Any) -> None:
    model = Tasks()
    balance = GradNorm(3, path=path, step=step).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(8):
        optimizer.zero_grad()
        balance(model(x()), model.shared.parameters()).backward()
        optimizer.step()
        assert_close(balance.weights.sum(), torch.tensor(3.0).double())
        assert (balance.weights > 0).all()
    assert not list(balance.parameters())
    assert balance.weights.grad_fn is None


def test_the_total_passes_gradients_of_the_weighted_sum_only() -> None:
    model, z = Tasks(), x()
    balance = GradNorm(3).double()
    balance.weights = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    losses = model(z)
    found = torch.autograd.grad(balance(losses, model.shared.weight), list(model.parameters()))
    losses = model(z)
    wanted = torch.autograd.grad(0.5 * losses[0] + losses[1] + 1.5 * losses[2], list(model.parameters()))
    assert_close(found, wanted)


def test_a_first_loss_of_zero_waits() -> None:
    w = nn.Parameter(torch.ones(2))
    balance = GradNorm(2)
    balance([w[0] * 0, w[1] * 2], w)
    assert balance.weights.isfinite().all()
    assert_close(balance.initial, torch.tensor([0.0, 2.0]))
    balance([w[0] * 3, w[1] * 2], w)
    assert_close(balance.initial, torch.tensor([3.0, 2.0]))
    both = GradNorm(2)
    both([w[0] * 0, w[1] * 0], w)
    assert_close(both.weights, torch.ones(2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", ["additive", "multiplicative"])
def test_a_broken_step_leaves_the_weights(bad: float, step: Any) -> None:
    w = nn.Parameter(torch.ones(2))
    balance = GradNorm(2, step=step)
    balance([w.sum(), 3 * w.sum()], w)
    before = copy.deepcopy(balance.state_dict())
    balance([w.sum() * bad, w.sum()], w)
    assert_close(balance.state_dict(), before, rtol=0, atol=0)
    late = GradNorm(2)
    late([w.sum() * bad, w.sum()], w)
    assert_close(late.initial, torch.tensor([0.0, 2.0]))


def test_evaluation_and_no_grad_only_sum() -> None:
    model = Tasks()
    balance = GradNorm(3).double()
    before = copy.deepcopy(balance.state_dict())
    balance.eval()(model(x()), model.shared.weight)
    balance.train()
    with torch.no_grad():
        balance(model(x()), model.shared.weight)
    assert_close(balance.state_dict(), before, rtol=0, atol=0)


def test_state_dict_copy_and_pickle_continue_alike() -> None:
    model, z = Tasks(), x()
    balance = GradNorm(3).double()
    balance(model(z), model.shared.weight)
    fresh = GradNorm(3).double()
    fresh.load_state_dict(balance.state_dict())
    others = [fresh, copy.deepcopy(balance), pickle.loads(pickle.dumps(balance))]
    for one in (balance, *others):
        one(model(z), model.shared.weight)
    for other in others:
        assert_close(other.state_dict(), balance.state_dict(), rtol=0, atol=0)
        assert repr(other) == repr(balance)


def test_losses_as_a_tensor_and_in_half_precision() -> None:
    w = nn.Parameter(torch.ones(2))
    balance = GradNorm(2)
    total = balance(w * torch.tensor([1.0, 3.0]), w)
    assert_close(total, torch.tensor(4.0))
    half = nn.Parameter(torch.ones(2).bfloat16())
    total = balance(half * 2, half)
    assert total.dtype == torch.bfloat16
    assert balance.weights.dtype == torch.float32
