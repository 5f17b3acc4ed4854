import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

import normkit as nk
from foreign_norms import DetectorsFrozenBatchNorm2d, wired
from normkit import apply_recipe, condition
from normkit.core.errors import SurgeryError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 5))


def test_the_first_and_the_last_layer_get_unit_rows():
    model = net()
    changes = condition(model)
    assert [row.layer for row in changes] == ["0", "4"]
    for layer in (model[0], model[4]):
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.ones(layer.weight.shape[0]))
    assert not hasattr(model[2], "parametrizations")


def test_options_reach_the_method():
    model = net()
    condition(model, "col", "re:4", gain=2.0, gradient="detach")
    torch.testing.assert_close(model[4].weight.norm(dim=0), torch.full((8,), 2.0))


def test_attention_is_conditioned_and_its_fused_path_agrees():
    model = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    changes = condition(model, where="all")
    assert [row.layer for row in changes] == ["in_proj_weight", "out_proj"]
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


def test_zero_matrices_are_named_and_adapters_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model.lora_A, model.lora_B = nn.ModuleDict({"default": nn.Linear(4, 2)}), nn.Linear(2, 4)
    nn.init.zeros_(model[2].weight)
    with pytest.warns(UserWarning, match=r"^2: Equilibrate: .*leave this layer out"):
        changes = condition(model, where="all")
    assert [row.layer for row in changes] == ["0", "2"]
    assert "all zero" in changes.rows[1].note


EPS = 1e-14  # so that it does not show
# Layer and the norm behind it, and the shape of their input.
TRAINED: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv": (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, EPS)], (8, 4, 5, 5)),
    "conv, no bias": (lambda: [nn.Conv1d(4, 6, 3, bias=False), nk.BatchNorm(6, EPS)], (8, 4, 5)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2), nk.GhostBatchNorm(6, 4, EPS)], (8, 4, 5, 5)),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6, EPS, affine=False)], (8, 4)),
    "linear, channels last": (lambda: [nn.Linear(4, 6), nk.BatchNorm(6, EPS, layout="n * c")], (8, 3, 4)),
    "renorm": (lambda: [nn.Conv2d(4, 6, 3), nk.BatchRenorm(6, EPS)], (8, 4, 5, 5)),
    "instance": (lambda: [nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, EPS, track_running_stats=True)], (8, 4, 5, 5)),
}
RECIPES = ["keep+e@all", "keep+sn", "keep+wn", "keep+wn+e@all", "keep+sn+e@all"]


def lived_in(*modules: nn.Module, shape: tuple[int, ...]) -> nn.Sequential:
    model = nn.Sequential(*modules).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 3)
        for _ in range(20):
            model(torch.randn(shape, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("make", "shape"), TRAINED.values(), ids=TRAINED)
def test_a_trained_network_computes_the_same(make, shape, recipe):
    model, x = lived_in(*make(), shape=shape), torch.randn(shape, dtype=torch.float64)
    wanted, weight = model(x), model[0].weight.detach().clone()
    notes = "".join(row.note for row in apply_recipe(model, recipe, x))
    assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    assert ("running statistics of 1 carried along" in notes) == (recipe != "keep+wn")
    if recipe != "keep+wn":
        assert (model[0].weight - weight).abs().max() > 0.1


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (8, 6, 4)),
        (nn.Linear(4, 6), nk.BatchRenorm(6), (8, 6, 4)),
        (nn.Linear(4, 6), nn.BatchNorm2d(6), (8, 6, 3, 4)),
        (nn.Linear(4, 6), nn.InstanceNorm1d(6, track_running_stats=True), (6, 4)),  # one sample, as torch takes it
        (nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), (4, 6)),
        (nn.Conv1d(4, 6, 1), nk.BatchNorm(6, layout="n * c"), (8, 4, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "x".join(map(str, value)),
)
def test_statistics_of_another_axis_stay(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = lived_in(copy.deepcopy(layer), copy.deepcopy(norm), shape=shape)
    state = copy.deepcopy(model[1].state_dict())
    (row,) = condition(model, where="all", example=torch.randn(shape, dtype=torch.float64))
    assert row.note.startswith("running statistics of 1 are those of the weight before; call recalibrate")
    assert_close(model[1].state_dict(), state, rtol=0, atol=0)


def test_statistics_behind_a_linear_layer_stay_where_its_axes_are_not_known() -> None:
    model, x = lived_in(nn.Linear(4, 6), nn.BatchNorm1d(6), shape=(8, 4)), torch.randn(8, 4).double()
    (row,) = condition(copy.deepcopy(model), where="all")
    assert "are those of the weight before" in row.note
    (row,) = condition(model, where="all", example=x)
    assert row.note == "running statistics of 1 carried along"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_carries_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 4))
    rows = apply_recipe(model, "keep+e@all").rows
    assert [row.note for row in rows] == ["", ""]


def test_where_statistics_can_not_be_carried_the_row_says_so():
    def trained(*between: nn.Module) -> nn.Sequential:
        return lived_in(nn.Linear(4, 6), *between, nn.BatchNorm1d(6), shape=(8, 4))

    hooked = trained()
    hooked[0].register_forward_hook(lambda module, args, output: output * 2)
    twice = wired(lambda self, x: self.norm(z := self.layer(x)) + z, layer=trained()[0], norm=trained()[1])
    for model, stale in ((trained(nn.ReLU()), "2"), (twice, "norm"), (hooked, "1")):
        (row,) = condition(model, where="all")
        assert row.note.startswith(f"running statistics of {stale} are those of the weight before; call recalibrate")
    branching = wired(lambda self, x: self.layers(x) if x.sum() > -1e9 else x, layers=trained())
    (row,) = condition(branching, where="all")
    assert row.note.startswith("running statistics behind it, if there are any, are those")
    (row,) = condition(trained(), "col", "all")
    assert "recalibrate" in row.note
    (row,) = condition(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), where="all")
    assert not row.note  # nothing was learned yet
    (row,) = condition(nn.Sequential(trained()[1], nn.ReLU(), nn.Linear(6, 3)), where="all")
    assert not row.note  # none is behind it


def test_statistics_are_as_they_were_if_it_fails():
    model = lived_in(nn.Linear(4, 6), nn.BatchNorm1d(6), shape=(8, 4))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError):
        apply_recipe(model, "keep+e@all+wn")
    assert_close(model.state_dict(), state, rtol=0, atol=0)


def residual() -> nn.Module:
    convs = {f"conv{k}": nn.Conv2d(3, 3, 3, padding=1) for k in (1, 2)}
    norms = {f"bn{k}": DetectorsFrozenBatchNorm2d(3, EPS) for k in (1, 2)}
    return wired(lambda self, x: x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())), **convs, **norms)


def test_frozen_norms_in_residual_networks():
    model, x = nn.Sequential(residual(), residual()).double(), torch.randn(2, 3, 5, 5).double()
    wanted = model(x)
    rows = condition(model, where="all").rows
    assert [row.note.split()[3] for row in rows] == ["0.bn1", "0.bn2", "1.bn1", "1.bn2"]
    assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell])
def test_every_matrix_of_a_recurrent_layer_is_conditioned(kind) -> None:
    model = nn.ModuleList([kind(3, 4), nn.Linear(4, 2)]).double()
    matrices = {name for name, p in model[0].named_parameters() if p.dim() > 1}
    changes = condition(model, where="all")
    assert {row.layer for row in changes} == {f"0.{name}" for name in matrices} | {"1"}
    for name in matrices:
        assert_close(getattr(model[0], name).norm(dim=1), torch.ones(getattr(model[0], name).shape[0]).double())
    x = torch.randn(5, 3).double()
    out = model[0](x)
    y = out[0] if isinstance(out, tuple) else out
    y.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model[0].parameters() if p.grad is not None)
    twin = copy.deepcopy(model)
    changes.undo()
    assert {name for name, p in model[0].named_parameters() if p.dim() > 1} == matrices
    again, kept = model[0](x), twin[0](x)
    nk.fold(twin)
    found = twin[0](x)
    assert_close(*((part[0] if isinstance(part, tuple) else part) for part in (found, kept)))
    assert not torch.allclose(again[0] if isinstance(again, tuple) else again, y)


HOOKED: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
}


# torch calls its older weight norm deprecated.
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(("name", "put"), HOOKED.items(), ids=HOOKED)
def test_a_layer_whose_weight_a_hook_makes_is_left_and_the_row_says_so(name, put) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    put(model[0])
    keys = list(model[0].state_dict())
    for changes in (condition(model, where="all"), apply_recipe(model, "keep+wn@re:0")):
        (left,) = changes.passed_over
        assert str(left) == f"0: left: its weight is made by torch.nn.utils.{name}; remove that first"
    assert list(model[0].state_dict()) == keys
    with pytest.raises(SurgeryError, match=f"made by torch.nn.utils.{name}; remove that first"):
        nk.surgery.reassign_spectral_(model[0])
