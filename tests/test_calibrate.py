"""Parameters that surgery sets: calibrated norms, data-dependent initialization, hard spectral norms."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs
from torch.testing import assert_close

from foreign_norms import random_, wired
from normkit import convert
from normkit.core.errors import SurgeryError
from normkit.surgery import data_dependent_init, reassign_spectral_
from normkit.weights import spectral_norm, weight_norm


def trained_batch_norms() -> nn.Sequential:
    body = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()
    for layer in body[1::3]:
        nn.init.normal_(layer.weight, 1.0, 0.3)
        nn.init.normal_(layer.bias)
    for _ in range(30):
        model(torch.randn(16, 3, 6, 6).double() + 1)
    return model.eval()


@pytest.mark.parametrize("to", ["gn:4", "ln", "in", "dyt"])
def test_calibration_fits_new_norms_to_what_the_old_ones_gave(to):
    model, batches = trained_batch_norms(), [torch.randn(16, 3, 6, 6).double() + 1 for _ in range(4)]
    swapped, state = convert(copy.deepcopy(model), to).model, copy.deepcopy(model.state_dict())
    wanted = torch.cat([model(x) for x in batches])

    def error(other):
        return ((torch.cat([other(x) for x in batches]) - wanted).norm() / wanted.norm()).item()

    before = error(swapped)
    changes = convert(model, to, calibrate=iter(batches))
    assert [row.layer for row in changes] == ["2", "5", "8", "(model)"]
    assert changes.rows[-1].before == f"error {before:.2g}"
    assert changes.rows[-1].error == pytest.approx(error(model))
    assert error(model) < 0.8 * before
    for row in list(changes)[:-1]:
        assert row.error is not None
        assert "before calibration" in row.note
    assert changes.undo() is model
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_calibration_finds_what_a_gain_and_a_bias_can_give():
    norm = random_(nn.GroupNorm(8, 8)).double()
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), norm).double(), torch.randn(4, 3, 5, 8).double()
    wanted, weight = model(x), norm.weight
    changes = convert(model, "in", calibrate=[(x, "targets are not read")])
    assert model[1].weight is weight
    assert changes.rows[0].error == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(model(x), wanted)
    for to, why in (("bn", "it normalizes by running"), ("rms", "it has no gain and bias"), ("none", "it has no gain")):
        note = convert(nn.Sequential(nn.GroupNorm(2, 4)), to, calibrate=[torch.randn(3, 4, 2)]).rows[0].note
        assert f"not calibrated: {why}" in note
    with pytest.raises(SurgeryError, match="calibrate has no batches"):
        convert(model, "ln", calibrate=[])


def test_every_channel_keeps_its_mean_and_deviation_in_the_changed_model():
    model, batches = trained_batch_norms(), [torch.randn(n, 3, 6, 6).double() + 1 for n in (16, 7)]

    def moments(layer):
        seen = []
        handle = layer.register_forward_hook(lambda _, args, y: seen.append(y.movedim(1, 0).flatten(1)))
        for x in batches:
            model(x)
        handle.remove()
        return torch.stack(torch.std_mean(torch.cat(seen, 1), 1))

    wanted = [moments(model[k]) for k in (2, 5, 8)]
    convert(model, "gn:4", calibrate=batches)
    torch.testing.assert_close([moments(model[k]) for k in (2, 5, 8)], wanted, rtol=1e-9, atol=1e-9)  # float64


def _model() -> nn.Sequential:
    first, second = nn.Conv2d(3, 6, 3, groups=3), nn.ConvTranspose2d(6, 4, 3, stride=2)
    return nn.Sequential(
        *(weight_norm(first), nn.ReLU(), weight_norm(second, dim=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten()),
        *(theirs.weight_norm(nn.Linear(4 * 9 * 9, 5)), nn.ReLU(), weight_norm(nn.Linear(5, 1), dim=None)),
    ).double()


def _pre_activations(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda _, args, y, name=name: found.setdefault(name, y))
    model(x)
    return found


def _same(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_every_pre_activation_has_mean_zero_and_variance_one(training: bool) -> None:
    model, x = _model().train(training), torch.randn(32, 3, 6, 6).double() * 3 + 1
    parameters, buffers = list(model.parameters()), [buffer.clone() for buffer in model.buffers()]
    directions = copy.deepcopy([model[at].parametrizations.weight.original1 for at in (0, 2, 6, 8)])
    changes = data_dependent_init(model, x)
    assert [row.layer for row in changes] == ["0", "2", "6", "8"]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_close([model[at].parametrizations.weight.original1 for at in (0, 2, 6, 8)], directions, rtol=0, atol=0)
    assert_close(list(model.buffers()), buffers, rtol=0, atol=0)
    for t in _pre_activations(model, x).values():
        dims = [dim for dim in range(t.dim()) if dim != 1]
        zero = torch.zeros(t.shape[1]).double()
        # The eps of 1e-8 beside deviations that were of order one.
        assert_close((t.mean(dims), t.var(dims, correction=0)), (zero, zero + 1), rtol=0, atol=1e-06)


def test_a_linear_layer_by_the_formula() -> None:
    layer, x = weight_norm(nn.Linear(4, 3).double()), torch.randn(20, 7, 4).double()
    v = layer.parametrizations.weight.original1.detach()
    t = x @ (v / v.norm(dim=1, keepdim=True)).T
    mean, std = t.mean((0, 1)), t.std((0, 1), correction=0)
    assert data_dependent_init(layer, x).rows[0].layer == "(model)"
    assert_close(layer.parametrizations.weight.original0.detach().flatten(), 1 / std, rtol=1e-6, atol=0)
    assert_close(layer.bias.detach(), -mean / std, rtol=1e-6, atol=1e-12)


def test_a_layer_without_bias_is_scaled_alone_and_hooks_see_what_they_saw() -> None:
    model = nn.Sequential(weight_norm(nn.Conv1d(2, 3, 2, bias=False)), nn.Linear(4, 2)).double()
    x, seen = torch.randn(9, 2, 5).double() + 2, []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    changes = data_dependent_init(model, {"input": x})
    assert changes.rows[0].note.endswith("no bias: means stay")
    assert_close(seen[0], model[0](x).detach(), rtol=1e-9, atol=1e-9)
    assert_close(seen[0].var((0, 2), correction=0), torch.ones(3).double(), rtol=0, atol=1e-6)
    assert not model[0]._forward_pre_hooks


def test_low_precision_and_layers_that_are_not_reached() -> None:
    parts = {name: weight_norm(nn.Linear(4, 4)) for name in ("twice", "unused")}
    model = wired(lambda self, x: self.twice(self.twice(x)), **parts).bfloat16()
    x = torch.randn(64, 4).bfloat16()
    changes = data_dependent_init(model, (x,))
    assert "does not reach" in changes.passed_over[0].reason
    # A bfloat16 keeps 8 bits.
    assert_close(model.twice(x).float().std(0, correction=0), torch.ones(4), rtol=0.02, atol=0)


def test_a_failure_leaves_everything() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), weight_norm(nn.Linear(4, 2))).double()
    model[2].parametrizations.weight.original1.data[1] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match="2: output units 1 are constant"):
        data_dependent_init(model, torch.randn(8, 4).double())
    _same(model, before)
    with pytest.raises(SurgeryError, match="does not run on the batch"):
        data_dependent_init(nn.Sequential(model[0], model[1], nn.Linear(3, 3).double()), torch.randn(8, 4).double())
    _same(model, before)
    with pytest.raises(SurgeryError, match=r"0: output units 0, 1, 2, 3 are constant.*larger batch"):
        data_dependent_init(model, torch.full((8, 4), 0.3).double())
    _same(model, before)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def _perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).double()


def _norms(model: nn.Module) -> Tensor:
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    return torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in weights])


def test_every_layer_becomes_one_and_the_network_is_lipschitz() -> None:
    model = _perceptron()
    parameters, before = list(model.parameters()), _norms(model)
    found = reassign_spectral_(model)
    assert list(found) == ["0.weight", "2.weight", "4.weight"]
    assert_close(torch.stack(list(found.values())), before)
    assert_close(_norms(model), torch.ones(3).double())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    x, y = torch.randn(2, 200, 6).double()
    assert ((model(x) - model(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-9)).all()


def test_only_above_one_leaves_small_weights() -> None:
    model = _perceptron()
    model[0].weight.data *= 0.1 / _norms(model)[0]
    model[2].weight.data *= 7 / _norms(model)[1]
    kept = model[0].weight.detach().clone()
    reassign_spectral_(model, "re:^[02]$", only_above_one=True)
    assert_close(model[0].weight.detach(), kept, rtol=0, atol=0)
    assert_close(_norms(model)[1], torch.tensor(1.0).double())


def test_vectors_that_are_kept_catch_up() -> None:
    torch.manual_seed(3)
    warm, memory = _perceptron(), {}
    optimizer = torch.optim.SGD(warm.parameters(), 0.05)
    worst = []
    for _ in range(30):
        optimizer.zero_grad()
        (warm(torch.randn(16, 6).double()) - 1).square().mean().backward()
        optimizer.step()
        reassign_spectral_(warm, exact=False, memory=memory)
        worst.append(_norms(warm).max().item())
    assert set(memory) == {"0.weight", "2.weight", "4.weight"}
    # Iterated sigma is an under-estimate, so the norm stays at 1 or above: by little once the vectors have settled.
    assert all(value >= 1 - 1e-12 for value in worst)
    assert max(worst[10:]) < 1.01


def test_convolutions_are_bounded_by_their_unfolding() -> None:
    for layer in (nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3), nn.Conv2d(3, 4, 1).bfloat16()):
        reassign_spectral_(layer)
        dim = int(isinstance(layer, nn.ConvTranspose1d))
        sigma = torch.linalg.matrix_norm(layer.weight.detach().double().movedim(dim, 0).flatten(1), 2)
        # bfloat16 rounds each element to 2^-9.
        assert_close(sigma.item(), 1.0, rtol=2**-8 if layer.weight.dtype == torch.bfloat16 else 1e-5, atol=0)


def test_a_shared_weight_is_divided_once_and_refusals_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].weight.data *= 5
    assert list(reassign_spectral_(model)) == ["0.weight"]
    spectral_norm(model[1])
    other = nn.Sequential(nn.Linear(4, 4), model[1])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SurgeryError, match=r"1: its weight is parametrized.*fold"):
        reassign_spectral_(other)
    assert_close(other.state_dict(), before, rtol=0, atol=0)
