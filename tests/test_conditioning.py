"""Condition numbers, and what is true and what is not of diagonal scaling."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from normkit.core.errors import ShapeError
from normkit.diagnostics.conditioning import (
    chi,
    condition_number,
    conditions,
    layer_spectrum,
    operator_norm,
    operator_spectrum,
    weight_conditions,
)
from normkit.weights.spectral_norm import spectral_norm
from normkit.weights.weight_conditioning import weight_conditioning
from normkit.weights.weight_norm import weight_norm


def test_a_condition_number_is_a_ratio_of_singular_values() -> None:
    a = torch.randn(3, 5)
    values = torch.linalg.svdvals(a.double())
    assert math.isclose(condition_number(a), (values[0] / values[2]).item(), rel_tol=1e-12)
    assert condition_number(torch.tensor([[1.0, 2.0], [2.0, 4.0]])) == math.inf
    assert condition_number(torch.zeros(2, 3)) == math.inf
    assert condition_number(torch.diag(torch.tensor([1.0, 1e-11]))) < math.inf
    assert math.isnan(condition_number(torch.tensor([[math.nan, 1.0]])))
    assert math.isnan(chi(torch.tensor([[math.inf, 1.0]])))
    turned = a.double() * torch.tensor([1, 1j, -1])[:, None]  # by a unitary matrix
    assert math.isclose(condition_number(turned), condition_number(a), rel_tol=1e-12)
    assert chi(torch.ones(2, 2)) == math.inf
    for bad in (torch.randn(3), torch.randn(2, 2, 2), torch.zeros(0, 3)):
        with pytest.raises(ShapeError, match="wanted a matrix"):
            condition_number(bad)


def test_sizes_that_do_not_fit() -> None:
    for size in ((2,), (3, 3), (2, 2, 2)):
        with pytest.raises(ShapeError, match="one size per axis of taps"):
            operator_spectrum(torch.ones(1, 1, 3), size)
    with pytest.raises(ShapeError, match="groups=2"):
        operator_spectrum(torch.ones(3, 1, 3), (4,), groups=2)


def test_every_layer_is_found_whatever_it_carries() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 3),
            "ours": weight_conditioning(nn.Conv2d(3, 4, 3)),
            "length": weight_norm(nn.Linear(4, 3)),
            "spectral": spectral_norm(nn.Linear(4, 3)),
            "torch's": parametrizations.orthogonal(nn.Linear(4, 3)),
            "transposed": nn.ConvTranspose2d(3, 4, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "recurrent": nn.GRU(3, 4),
            "norm": nn.LayerNorm((3, 4)),
            "batch": nn.BatchNorm1d(3),
            "words": nn.Embedding(7, 3),
        }
    )
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    found = weight_conditions(model)
    assert set(found) == {
        "plain", "ours", "length", "spectral", "torch's", "transposed", "attention.in_proj_weight", "attention.out_proj",
        "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "words",
    }  # fmt: skip
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert modes == [module.training for module in model.modules()]
    assert math.isclose(found["torch's"][1], 1.0, rel_tol=1e-5)
    for name, layer in model.items():
        if name in found:
            assert math.isclose(found[name][1], condition_number(matrix_of(layer)), rel_tol=1e-6)
    v = model["length"].get_parameter("parametrizations.weight.original1")
    assert math.isclose(found["length"][0], condition_number(v), rel_tol=1e-12)
    assert math.isclose(found["spectral"][0], found["spectral"][1], rel_tol=1e-5)
    assert set(weight_conditions(model, lambda name, _: name == "plain")) == {"plain"}
    assert set(weight_conditions(model["plain"])) == {""}


def matrix_of(layer: nn.Module) -> Tensor:
    weight = layer.eval().weight
    assert isinstance(weight, Tensor)
    return weight.transpose(0, 1).flatten(1) if isinstance(layer, nn.ConvTranspose2d) else weight.flatten(1)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (6,)),
    "2d, groups": (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular", groups=2), (4, 5)),
    "dilated": (nn.Conv2d(2, 3, 2, dilation=(2, 1), padding="same", padding_mode="circular"), (5, 4)),
    "3d": (nn.Conv3d(2, 2, (1, 2, 2), padding="same", padding_mode="circular"), (2, 3, 2)),
    "strides": (nn.Conv2d(2, 3, 3, stride=(2, 1), padding=1, padding_mode="circular"), (6, 5)),
    "strides, groups": (nn.Conv1d(4, 6, 4, stride=4, groups=2), (8,)),
    "transposed": (nn.ConvTranspose2d(4, 3, 2, stride=2), (3, 2)),
}


@pytest.mark.parametrize(("layer", "size"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_an_operator_is_that_of_the_whole_matrix(layer, size) -> None:
    layer = copy.deepcopy(layer).double()
    layer.bias.data.zero_()
    x = torch.zeros(1, layer.in_channels, *size).double()
    # None of these overlaps an edge but by circular padding, so that each is the operator itself.
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())
    values = torch.linalg.svdvals(jacobian)
    (row,) = conditions(nn.Sequential(layer), example=x)
    assert_close(row.operator, (values[0].item(), values[-1].item()), rtol=1e-9, atol=1e-12)
    if not layer.transposed:
        assert_close(layer_spectrum(layer, layer.weight, size), values, rtol=1e-9, atol=1e-9)
    if layer.stride[0] == 1:
        assert math.isclose(operator_norm(layer, size), values[0].item(), rel_tol=1e-9)
        # What spectral normalization holds at 1 bounds it by the root of the number of taps.
        sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert sigma * (1 - 1e-9) <= values[0] or layer.groups > 1
        assert values[0] <= math.prod(layer.kernel_size) ** 0.5 * sigma * (1 + 1e-9)


def test_operator_norms_of_other_layers() -> None:
    forward, back = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
    back.weight = forward.weight
    assert (
        operator_norm(back, (5, 5)) == operator_norm(forward, (5, 5)) == operator_norm(forward.weight, (5, 5), groups=2)
    )
    linear = nn.Linear(3, 4)
    assert math.isclose(operator_norm(linear), torch.linalg.matrix_norm(linear.weight.double(), 2).item(), rel_tol=1e-9)
    assert math.isclose(operator_norm(spectral_norm(nn.Linear(3, 4), exact=True)), 1.0, rel_tol=1e-5)
    assert math.isnan(operator_norm(torch.full((2, 2), math.nan)))
    with pytest.raises(ShapeError, match="stride 2x2 on inputs of size 7x8"):
        operator_norm(nn.Conv2d(3, 4, 3, stride=2), (7, 8))
    with pytest.raises(ShapeError, match="one size per axis of taps"):
        operator_norm(nn.Conv2d(3, 4, 3, dilation=3), (6, 6))


HOOKED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "weight_orig"),
    "weight norm": (nn.utils.weight_norm, "weight_v"),
    "spectral norm": (nn.utils.spectral_norm, "weight_orig"),
}


# torch calls its older weight norm deprecated.
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(("put", "raw"), HOOKED.values(), ids=HOOKED)
def test_a_weight_that_a_hook_makes_is_the_one_that_is_used(put, raw) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    put(model[0])
    model(torch.randn(2, 6))
    wanted = condition_number(model[0].get_parameter(raw)), condition_number(model[0].weight)
    assert weight_conditions(model) == {"0": wanted}
