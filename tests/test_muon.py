"""What an optimizer does: Muon's steps, warm-up schedules, decay by groups and by penalty."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from foreign_norms import random_
from laws import ACTIVATIONS, name
from normkit import GhostBatchNorm, RecurrentBatchNorm, fold
from normkit.core.card import Card
from normkit.gradients import Muon, matrix_groups
from normkit.schedules import inverse_sqrt_rate, inverse_sqrt_warmup, linear_rate, linear_warmup
from normkit.surgery import norm_penalty, param_groups
from normkit.weights import weight_layout


def _plain(weight: Tensor, gradients: list[Tensor], equilibrate: Any, beta: Any, after: Any) -> Tensor:
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
        *({"equilibrate": sides} for sides in (None, "row", "col", "rowcol")),
        *({"second_moment": 0.95}, {"renormalize": "row"}),
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
@pytest.mark.parametrize("options", [{}, {"equilibrate": "row"}, {"equilibrate": "col"}, {"second_moment": 0.9}])
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


def test_rates_are_the_closed_forms() -> None:
    for features, warmup in ((512, 4000), (64, 10), (1, 1)):
        peak = (features * warmup) ** -0.5
        for step in {1, 2, max(1, warmup - 1), warmup, warmup + 1, 4 * warmup}:
            wanted = features**-0.5 * min(step**-0.5, step * warmup**-1.5)
            assert inverse_sqrt_rate(step, features, warmup) == pytest.approx(wanted, rel=1e-12)
            assert inverse_sqrt_rate(step, features, warmup) <= peak * (1 + 1e-12)
        assert inverse_sqrt_rate(warmup, features, warmup) == pytest.approx(peak, rel=1e-12)
        assert inverse_sqrt_rate(4 * warmup, features, warmup) == pytest.approx(peak / 2, rel=1e-12)

    assert [linear_rate(t, 4) for t in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [linear_rate(t, 2, lambda s: 1 / (1 + s)) for t in range(1, 5)] == [0.5, 1.0, 0.5, 1 / 3]
    assert linear_rate(1, 0) == 1.0


def test_optimizers_follow_them_from_the_first_step_and_resume() -> None:
    def after(step: float) -> float:
        return 0.9**step

    for make, wanted in (
        (lambda o: inverse_sqrt_warmup(o, 16, 3), lambda t: 2.0 * inverse_sqrt_rate(t, 16, 3)),
        (lambda o: linear_warmup(o, 3, after), lambda t: 2.0 * linear_rate(t, 3, after)),
    ):
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=2.0)
        schedule = make(optimizer)
        for step in range(1, 8):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted(step), rel=1e-12)
            parameter.grad = torch.ones(1)
            optimizer.step()
            schedule.step()
        fresh = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        again = make(fresh)
        fresh.load_state_dict(optimizer.state_dict())
        again.load_state_dict(schedule.state_dict())
        assert again.get_last_lr() == schedule.get_last_lr()
        assert fresh.param_groups[0]["lr"] == pytest.approx(wanted(8), rel=1e-12)


def _normed() -> nn.Module:
    norms = nn.BatchNorm1d(4), nn.GroupNorm(2, 4), GhostBatchNorm(4, 2), nk.RMSNorm(5)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), *norms, nn.LSTM(5, 2)).double()
    random_(model)
    return model


def _loss(model: nn.Module) -> torch.Tensor:
    x = torch.arange(60.0).view(4, 3, 5).sin().double()
    return model(x)[0].square().sum()


def test_every_parameter_is_in_one_group() -> None:
    model = _normed()
    model[0].bias.requires_grad_(False)
    groups = {group["name"]: group for group in param_groups(model, 0.1, norm_decay=0.2, bias_decay=0.3)}
    found = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    sizes = {name: (group["weight_decay"], len(group["params"])) for name, group in groups.items()}
    assert sizes == {"weights": (0.1, 3), "norms": (0.2, 7), "biases": (0.3, 2)}


class _Patches(nn.Module):
    """What a vision or state space model has besides layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        self.scale, self.D = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.A_log, self.table = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(4, 2))
        self.A_log._no_weight_decay = True
        self.position_embeddings, self.matrix = nn.Embedding(5, 4), nn.Parameter(torch.ones(4, 4))

    def no_weight_decay(self) -> set[str]:
        return {"table"}


def test_what_is_no_weight_is_a_group_of_its_own() -> None:
    model = nn.ModuleDict({"body": _Patches(), "head": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    groups = param_groups(model, 0.1)
    names = {group["name"]: [name.removeprefix("body.") for name in group["param_names"]] for group in groups}
    assert names["weights"] == ["matrix", "head.weight"]
    others = {"cls_token", "pos_embed", "scale", "D", "A_log", "table", "position_embeddings.weight"}
    assert set(names["others"]) == others
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0, 0.0]
    nk.convert(model, "rms", optimizer=torch.optim.AdamW(groups))
    assert [len(group["params"]) for group in groups] == [2, 1, 1, 7]  # the bias is dropped


@pytest.mark.parametrize("target", [0, 1])
def test_groups_and_penalty_take_the_same_step(target) -> None:
    by_groups, by_penalty = (model := _normed()), copy.deepcopy(model)
    torch.optim.SGD(by_penalty.parameters(), lr=0.1)
    groups = param_groups(by_groups, 0.0, norm_decay=0.3, gamma_target=target)
    optimizers = torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(by_penalty.parameters(), lr=0.1)
    for model, optimizer, penalty in ((by_groups, optimizers[0], 0.0), (by_penalty, optimizers[1], 0.3)):
        (_loss(model) + norm_penalty(model, penalty, target)).backward()
        optimizer.step()
    assert norm_penalty(nn.Linear(2, 2), 0.3) == 0
    fold(by_groups)
    assert_close(by_groups.state_dict(), by_penalty.state_dict())


def test_gains_from_one_compute_the_same_and_decay_to_one() -> None:
    model = _normed().eval()
    wanted = _loss(model)
    groups = param_groups(model, 0.0, norm_decay=1.0, gamma_target=1)
    assert_close(_loss(model), wanted)
    assert len(param_groups(model, 0.0, gamma_target=1)[1]["params"]) == 7  # a second call changes nothing
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(40):
        optimizer.step()
    for layer in (1, 2, 3, 4):
        assert_close(model[layer].weight, torch.ones_like(model[layer].weight), rtol=0, atol=1e-9)
    assert_close(norm_penalty(model, 1.0), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9)


SHAPES = {"scalar": nk.ScaleNorm(4), "frames": RecurrentBatchNorm(4, "frame", 3), "pair": nk.QueryKeyNorm(4, length=3)}


@pytest.mark.parametrize("norm", SHAPES.values(), ids=SHAPES)
def test_gains_of_any_number_of_axes_are_those_of_norms(norm) -> None:
    groups = {group["name"]: group["params"] for group in param_groups(nn.Sequential(nn.Linear(4, 4), norm), 0.1)}
    assert [id(p) for p in groups["norms"]] == [id(p) for p in norm.parameters()]
    assert len(groups["weights"]) == len(groups["biases"]) == 1


# Weights of layers that the method holds: they decay as weights do.
_WITH_LAYERS = {
    *"film adaptive_layer_norm adaptive_layer_norm_zero spatially_adaptive_norm exemplar_norm fix_norm".split(),
    *("layer_norm_rnn", "layer_norm_lstm", "layer_norm_gru"),
}


@pytest.mark.parametrize("card", ACTIVATIONS, ids=name)
def test_only_layers_inside_a_method_decay_as_weights(card: Card) -> None:
    groups = {group["name"]: group["params"] for group in param_groups(card.make(4), 0.1)}
    assert ("weights" in groups) == (card.name in _WITH_LAYERS)
    assert all(parameter.dim() > 1 for parameter in groups.get("weights", ()))


def test_gains_from_one_are_whole_in_a_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    param_groups(model, 1e-4, gamma_target=1)
    x, twin = torch.randn(2, 2), copy.deepcopy(model)
    wanted = model(x)
    fold(twin)
    assert type(twin[1]) is nn.LayerNorm
    assert_close(twin(x), wanted)
    assert_close(model(x), wanted)


@pytest.mark.parametrize("card", ACTIVATIONS, ids=name)
def test_gains_from_one_leave_every_method_as_it_was(card: Card) -> None:
    made = card.make(4)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    param_groups(made, 0.1, gamma_target=1)
    fold(made.eval())
    assert_close(dict(made.state_dict()), before, rtol=0, atol=0)
