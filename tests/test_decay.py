"""Decay of gains and biases: by groups and by penalty alike."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from laws import ACTIVATIONS, name
from normkit.activations.ghost_batch_norm import GhostBatchNorm
from normkit.activations.recurrent_batch_norm import RecurrentBatchNorm
from normkit.core.card import Card
from normkit.core.errors import OptionError
from normkit.surgery.decay import norm_penalty, param_groups
from normkit.surgery.fold import fold


def _model() -> nn.Module:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), GhostBatchNorm(4, 2), nk.RMSNorm(5), nn.LSTM(5, 2)
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def _loss(model: nn.Module) -> torch.Tensor:
    x = torch.arange(60.0).view(4, 3, 5).sin().double()
    return model(x)[0].square().sum()


def test_every_parameter_is_in_one_group() -> None:
    model = _model()
    model[0].bias.requires_grad_(False)
    groups = {group["name"]: group for group in param_groups(model, 0.1, norm_decay=0.2, bias_decay=0.3)}
    found = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert {name: (group["weight_decay"], len(group["params"])) for name, group in groups.items()} == {
        "weights": (0.1, 3),
        "norms": (0.2, 7),
        "biases": (0.3, 2),
    }


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
    by_groups, by_penalty = (model := _model()), copy.deepcopy(model)
    torch.optim.SGD(by_penalty.parameters(), lr=0.1)
    groups = param_groups(by_groups, 0.0, norm_decay=0.3, gamma_target=target)
    optimizers = torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(by_penalty.parameters(), lr=0.1)
    for model, optimizer, penalty in ((by_groups, optimizers[0], 0.0), (by_penalty, optimizers[1], 0.3)):
        (_loss(model) + norm_penalty(model, penalty, target)).backward()
        optimizer.step()
    fold(by_groups)
    assert_close(by_groups.state_dict(), by_penalty.state_dict())


def test_gains_from_one_compute_the_same_and_decay_to_one() -> None:
    model = _model().eval()
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


def test_penalty_by_hand() -> None:
    model = _model()
    gains = [model[layer].weight for layer in (1, 2, 3, 4)]
    biases = [model[layer].bias for layer in (1, 2, 3)]
    for target in (0, 1):
        wanted = 0.15 * (sum((g - target).square().sum() for g in gains) + sum(b.square().sum() for b in biases))
        assert_close(norm_penalty(model, 0.3, target), wanted)
    assert norm_penalty(nn.Linear(2, 2), 0.3) == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="norm_decay=-1"):
        param_groups(nn.LayerNorm(2), 0.0, norm_decay=-1)
    with pytest.raises(OptionError, match="gamma_target=2"):
        norm_penalty(nn.LayerNorm(2), 0.1, 2)


@pytest.mark.parametrize(
    "norm",
    [nk.ScaleNorm(4), RecurrentBatchNorm(4, "frame", max_length=3), nk.QueryKeyNorm(4, length=3)],
    ids=lambda n: type(n).__name__,
)
def test_gains_of_any_number_of_axes_are_those_of_norms(norm) -> None:
    groups = {group["name"]: group["params"] for group in param_groups(nn.Sequential(nn.Linear(4, 4), norm), 0.1)}
    assert [id(p) for p in groups["norms"]] == [id(p) for p in norm.parameters()]
    assert len(groups["weights"]) == len(groups["biases"]) == 1


# Weights of layers that the method holds: they decay as weights do.
_WITH_LAYERS = {
    *(
        "film",
        "adaptive_layer_norm",
        "adaptive_layer_norm_zero",
        "spatially_adaptive_norm",
        "exemplar_norm",
        "fix_norm",
    ),
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
