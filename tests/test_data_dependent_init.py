"""Data-dependent initialization: mean 0 and variance 1 behind every layer, and nothing half done."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs
from torch.testing import assert_close

from normkit.core.errors import SurgeryError
from normkit.surgery.data_dependent_init import data_dependent_init
from normkit.weights.weight_conditioning import weight_conditioning
from normkit.weights.weight_norm import weight_norm


def _model() -> nn.Sequential:
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 6, 3, groups=3)),
        nn.ReLU(),
        weight_norm(nn.ConvTranspose2d(6, 4, 3, stride=2), dim=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        theirs.weight_norm(nn.Linear(4 * 9 * 9, 5)),
        nn.ReLU(),
        weight_norm(nn.Linear(5, 1), dim=None),
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
        assert_close(t.mean(dims), zero, rtol=0, atol=1e-6)
        assert_close(t.var(dims, correction=0), zero + 1, rtol=0, atol=1e-6)


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
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.unused = weight_norm(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(x))

    model, x = Partly().bfloat16(), torch.randn(64, 4).bfloat16()
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


def test_what_can_not_be_set_unit_by_unit_is_refused() -> None:
    x = torch.randn(8, 4, 5)
    for layer, cure in (
        (weight_norm(nn.Linear(5, 5), dim=1), "with dim=0"),
        (weight_norm(nn.Linear(5, 3), dim=None), "with dim=0"),
        (theirs.weight_norm(nn.ConvTranspose1d(4, 4, 3)), "with dim=1"),
        (weight_norm(nn.ConvTranspose1d(4, 4, 3, groups=2), dim=1), "without groups"),
        (weight_conditioning(weight_norm(nn.Linear(5, 3))), "before that is put on"),
    ):
        with pytest.raises(SurgeryError, match=cure):
            data_dependent_init(layer, x)
    with pytest.raises(SurgeryError, match=r"no Linear, Conv.*keep\+wn"):
        data_dependent_init(nn.Linear(5, 3), x)
    with pytest.raises(SurgeryError, match="reaches none"):
        data_dependent_init(_Around(weight_norm(nn.Linear(5, 3))), x)


class _Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x
