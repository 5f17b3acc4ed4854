"""Muon and its relatives: a step against plain code, what goes to AdamW, what is refused."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.gradients import Muon, matrix_groups, orthogonalize
from normkit.weights.layout import weight_layout


def _plain(
    weight: Tensor, gradients: list[Tensor], equilibrate: str | None, beta: float | None, after: str | None
) -> Tensor:
    """Steps at lr 0.1 and decay 0.2, by axes written out and the published coefficients."""
    w, b, v = weight.clone(), torch.zeros_like(weight), torch.zeros(len(weight), 1, dtype=weight.dtype)
    for g in gradients:
        b = 0.9 * b + g
        u = g + 0.9 * b
        rows, columns = u.square().sum(1, keepdim=True).sqrt(), u.square().sum(0, keepdim=True).sqrt()
        u = u / (rows if equilibrate in ("row", "rowcol") else 1) / (columns if equilibrate in ("col", "rowcol") else 1)
        o = (u if len(u) <= u.shape[1] else u.T) / u.norm()
        for _ in range(5):
            o = 3.4445 * o - 4.7750 * o @ o.T @ o + 2.0315 * o @ o.T @ o @ o.T @ o
        o = o if len(u) <= u.shape[1] else o.T
        if beta is not None:
            v = beta * v + (1 - beta) * o.square().mean(1, keepdim=True)
            o = o / v.sqrt()
            o = o * math.sqrt(min(o.shape)) / o.norm()
        if after is not None:
            o = o / o.norm(dim=1 if after == "row" else 0, keepdim=True)
        w = (1 - 0.1 * 0.2) * w - 0.1 * 0.2 * math.sqrt(max(w.shape)) * o
    return w


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"equilibrate": "row"},
        {"equilibrate": "col"},
        {"equilibrate": "rowcol"},
        {"second_moment": 0.95},
        {"renormalize": "row"},
        {"equilibrate": "row", "second_moment": 0.9, "renormalize": "col"},
    ],
    ids=str,
)
def test_a_step_is_the_formula(shape: tuple[int, int], options: dict[str, Any]) -> None:
    weight, *gradients = torch.randn(4, *shape, dtype=torch.float64)
    parameter = nn.Parameter(weight.clone())
    made = Muon([{"params": [parameter], "matrices": True}], 0.1, momentum=0.9, weight_decay=0.2, **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    wanted = _plain(weight, gradients, *(options.get(k) for k in ("equilibrate", "second_moment", "renormalize")))
    # The second moment's floor of 1e-8 is not in the plain code.
    assert_close(parameter.detach(), wanted, rtol=1e-6 if "second_moment" in options else 1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", [None, "row", "col", "rowcol"])
def test_large_gradients_step_as_small_ones_do(sides: Any) -> None:
    steps, gradient = [], torch.randn(4, 6)
    for scale in (1.0, 1e20, 1e37):
        parameter = nn.Parameter(torch.zeros(4, 6))
        parameter.grad = gradient * scale
        Muon([{"params": [parameter], "matrices": True}], 1.0, equilibrate=sides).step()
        steps.append(parameter.detach())
    for step in steps[1:]:
        assert_close(step, steps[0], rtol=1e-4, atol=1e-5)  # float32's rounding, which five steps multiply


def test_singular_values_end_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(16, 64)))
    assert 0.6 < values.min()
    assert values.max() < 1.3


def _model() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Flatten(), nn.Linear(24, 9))


def test_all_but_hidden_weights_step_as_adamw() -> None:
    model, tokens = _model(), torch.randint(9, (16, 3))
    twin = copy.deepcopy(model)
    by_muon = Muon(model, 0.01, weight_decay=0.1)
    by_adam = torch.optim.AdamW(twin.parameters(), 0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        for net, made in ((model, by_muon), (twin, by_adam)):
            net[1].load_state_dict(model[1].state_dict())
            made.zero_grad()
            net(tokens).square().sum().backward()
            made.step()
    for k in (0, 2, 4):
        for mine, torchs in zip(model[k].parameters(), twin[k].parameters(), strict=True):
            # The hidden weight, and so the gradients, differ after the first step; one step's difference is of that order.
            assert_close(mine, torchs, rtol=0.2, atol=0.02)
    vector = torch.randn(4)
    first, second = (nn.Parameter(vector.clone()) for _ in range(2))
    mine, torchs = Muon([first], 0.01), torch.optim.AdamW([second], 0.01, (0.9, 0.95), weight_decay=0.1)
    for k in range(5):
        for parameter, made in ((first, mine), (second, torchs)):
            parameter.grad = torch.linspace(-1, 1, 4) * (k + 1)
            made.step()
    assert torch.equal(first, second)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"equilibrate": "row"}, {"equilibrate": "col"}, {"second_moment": 0.9}], ids=str
)
def test_rows_are_output_units_of_a_transposed_convolution(options: dict[str, Any], groups: int) -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, groups=groups, bias=False, dtype=torch.float64)
    weight, layout = layer.weight, weight_layout(layer)
    matrix = nn.Parameter(layout.matrix(weight.detach()).clone())
    made = Muon(nn.ModuleList([layer, nn.Linear(2, 2)]), 0.1, **options)
    flat = Muon([{"params": [matrix], "matrices": True}], 0.1, **options)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        matrix.grad = layout.matrix(weight.grad).clone()
        made.step()
        flat.step()
    assert_close(layout.matrix(weight.detach()), matrix.detach(), rtol=1e-12, atol=1e-12)


def test_a_convolution_is_a_matrix_and_the_state_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    assert [len(group["params"]) for group in matrix_groups(model)] == [1, 3]
    made = Muon(model, second_moment=0.95)
    x = torch.randn(2, 3, 4, 4)

    def closure() -> Tensor:
        made.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    assert made.step(closure).item() > 0
    other = copy.deepcopy(model)
    again = Muon(other, second_moment=0.95)
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    for net, optimizer in ((model, made), (other, again)):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
