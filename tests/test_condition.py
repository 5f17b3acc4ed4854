import pytest
import torch
from torch import nn

from normkit.core.errors import SurgeryError
from normkit.surgery.condition import condition


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 5))


def test_the_first_and_the_last_layer_get_unit_rows():
    model = net()
    changes = condition(model)
    assert [row.name for row in changes] == ["0", "4"]
    for layer in (model[0], model[4]):
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.ones(layer.weight.shape[0]))
    assert not hasattr(model[2], "parametrizations")


def test_options_reach_the_method():
    model = net()
    condition(model, "col", "re:4", gain=2.0, gradient="detach")
    torch.testing.assert_close(model[4].weight.norm(dim=0), torch.full((8,), 2.0))


def test_raw_weights_stay_the_same_parameters():
    model = net()
    before = {id(parameter) for parameter in model.parameters()}
    condition(model, where="all")
    assert {id(parameter) for parameter in model.parameters()} == before


def test_attention_is_conditioned_and_its_fused_path_agrees():
    model = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    changes = condition(model, where="all")
    assert [row.name for row in changes] == ["in_proj_weight", "out_proj"]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    slow = model(x, x, x)[0]
    with torch.no_grad():
        fused = model(x, x, x)[0]
    torch.testing.assert_close(fused, slow.detach())
    torch.testing.assert_close(model.in_proj_weight.norm(dim=1), torch.ones(24, dtype=torch.float64))


def test_a_refusal_leaves_the_model_as_it_was():
    # The second layer has one element a row, which row mode would freeze; the first would have been done by then.
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3))
    keys = list(model.state_dict())
    with pytest.raises(SurgeryError, match="1: weight_conditioning:row can't be put on it"):
        condition(model, where="all")
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    model(torch.randn(2, 4))


def test_twice_is_refused():
    model = net()
    condition(model)
    with pytest.raises(SurgeryError, match=r"0: weight_conditioning:row is on it already.*fold"):
        condition(model)
    assert len(model[0].parametrizations.weight) == 1
    with pytest.raises(SurgeryError, match="mode"):
        condition(net(), "diagonal")
