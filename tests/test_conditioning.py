"""Condition numbers and curvature: spectra of weights and operators, Hessian and Gauss-Newton matrix."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import normkit as nk
from foreign_norms import wired
from normkit.core.errors import ShapeError
from normkit.diagnostics import condition_number, conditions, curvature
from normkit.diagnostics.conditioning import chi, layer_spectrum, operator_norm, weight_conditions
from normkit.diagnostics.curvature import Extremes, hessian, hessian_condition, hessian_extremes, smoothness
from normkit.diagnostics.spectrum import quadrature
from normkit.surgery.bake import bake
from normkit.weights.spectral_norm import spectral_norm
from normkit.weights.weight_conditioning import equilibrate, weight_conditioning
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


def test_every_layer_is_found_whatever_it_carries() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 3), "ours": weight_conditioning(nn.Conv2d(3, 4, 3)),
            "length": weight_norm(nn.Linear(4, 3)), "spectral": spectral_norm(nn.Linear(4, 3)),
            "torch's": parametrizations.orthogonal(nn.Linear(4, 3)), "transposed": nn.ConvTranspose2d(3, 4, 3),
            "attention": nn.MultiheadAttention(4, 2), "recurrent": nn.GRU(3, 4), "norm": nn.LayerNorm((3, 4)),
            "batch": nn.BatchNorm1d(3), "words": nn.Embedding(7, 3),
        }
    )  # fmt: skip
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
    found = {operator_norm(layer, (5, 5)) for layer in (back, forward)}
    assert found == {operator_norm(forward.weight, (5, 5), groups=2)}
    linear = nn.Linear(3, 4)
    assert math.isclose(operator_norm(linear), torch.linalg.matrix_norm(linear.weight.double(), 2).item(), rel_tol=1e-9)
    assert math.isclose(operator_norm(spectral_norm(nn.Linear(3, 4), exact=True)), 1.0, rel_tol=1e-5)
    assert math.isnan(operator_norm(torch.full((2, 2), math.nan)))


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


def attention() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.words(x)
        return self.last(self.mix(x, x, x, need_weights=False)[0].mean(1))

    mix = nn.MultiheadAttention(4, 2, batch_first=True)
    return wired(forward, words=nn.Embedding(5, 4), last=nn.Linear(4, 3), mix=mix)


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 3))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "tanh": lambda: (mlp(), torch.randn(12, 4)),
    "batch norm": lambda: (mlp(nk.BatchNorm(5)), torch.randn(12, 4)),
    "evaluated": lambda: (mlp(nn.BatchNorm1d(5), nn.Dropout(0.5)).eval(), torch.randn(12, 4)),
    "convolution": lambda: (nn.Sequential(nn.Conv2d(2, 3, 2), nk.GroupNorm(3, 3), nn.Flatten(), nn.Linear(12, 3)),
                            torch.randn(12, 2, 3, 3)),
    "attention": lambda: (attention(), torch.randint(5, (12, 3))),
    "conditioned": lambda: (nn.Sequential(weight_conditioning(nn.Linear(4, 5)), nn.Tanh(), weight_norm(nn.Linear(5, 3))),
                            torch.randn(12, 4)),
}  # fmt: skip


def case(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(3)
    model, x = NETS[name]()
    x = x.double() if x.is_floating_point() else x
    return model.double(), [(x, torch.randint(3, (12,)))]


def by_torch(model: nn.Module, x: Tensor, of: Callable[[Tensor], Tensor], derive: Any) -> Tensor:
    """A derivative by all parameters as one vector, of a function of the model's output."""
    names, values = zip(*((name, p.detach()) for name, p in model.named_parameters()), strict=True)
    twin = copy.deepcopy(model)

    def function(flat: Tensor) -> Tensor:
        parts = flat.split([value.numel() for value in values])
        given = {name: part.view_as(value) for name, part, value in zip(names, parts, values, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return of(torch.func.functional_call(twin, given, (x,)))

    return derive(function, torch.cat([value.flatten() for value in values]))


@pytest.mark.parametrize("name", NETS)
def test_both_matrices_are_those_of_torch(name: str) -> None:
    model, [(x, y)] = case(name)
    state = copy.deepcopy(model.state_dict())
    derived = torch.autograd.functional
    wanted = by_torch(model, x, lambda output: F.cross_entropy(output, y), derived.hessian)
    found = hessian(model, F.cross_entropy, [(x, y)])
    assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    first = by_torch(model, x, torch.flatten, derived.jacobian)
    output = model(x).detach()
    outer = derived.hessian(lambda z: F.cross_entropy(z.view_as(output), y), output.flatten())
    found = hessian(model, F.cross_entropy, [(x, y)], matrix="ggn")
    assert_close(found, first.T @ outer @ first, rtol=1e-9, atol=1e-10)
    model.load_state_dict(state)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("name", [name for name in NETS if name != "batch norm"])
def test_lanczos_over_chunks_finds_the_ends_of_the_dense_matrix(name: str, matrix: Any) -> None:
    model, [(x, y)] = case(name)
    dense = hessian_extremes(model, F.cross_entropy, [(x, y)], matrix=matrix)
    told: list[int] = []
    chunks = [(x[:5], y[:5]), (x[5:], y[5:])]
    options = {"dense": 0, "tolerance": 1e-9, "progress": lambda done, _: told.append(done)}
    found = hessian_extremes(model, F.cross_entropy, chunks, matrix=matrix, **options)
    # The tolerance is relative to the largest, of size 1 here.
    assert_close(found.largest, dense.largest, rtol=1e-6, atol=0)
    assert_close(found.smallest, dense.smallest, rtol=1e-6, atol=1e-8)
    assert found.products == told[-1] > 2
    assert dense.condition == found.condition or math.isnan(found.condition)


def test_a_definite_matrix_has_a_condition_number_either_way() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(30, 1, bias=False).double(), torch.randn(99, 30).double() * torch.arange(1, 31)
    for matrix in ("hessian", "ggn"):
        given = model, F.mse_loss, [(x, x[:, :1])]
        both = [hessian_extremes(*given, matrix=matrix, dense=n, tolerance=1e-10) for n in (0, 99)]
        values = torch.linalg.eigvalsh(2 * x.T @ x / 99)
        for found in both:
            assert_close(found.condition, (values[-1] / values[0]).item(), rtol=1e-6, atol=0)
    assert both[0].stable_rate == 2 / both[0].largest
    assert Extremes(-1.0, -2.0, 2.0, 0.0).stable_rate == math.inf


def test_effective_weights_are_those_of_the_baked_model() -> None:
    model, batches = case("conditioned")
    twin = copy.deepcopy(model)
    bake(twin)
    assert_close(hessian(model, F.cross_entropy, batches, by="effective"), hessian(twin, F.cross_entropy, batches))


def test_quadrature_integrates_polynomials() -> None:
    torch.manual_seed(0)
    a, v = torch.randn(9, 9).double(), torch.randn(9).double()
    a = a + a.T
    nodes, weights = quadrature(lambda x: a @ x, v, 4)
    unit = v / v.norm()
    for power in range(8):
        wanted = unit @ torch.linalg.matrix_power(a, power) @ unit
        assert_close((weights * nodes**power).sum(), wanted, rtol=1e-9, atol=1e-9)
    model, batches = case("tanh")
    found = curvature.spectral_density(model, F.cross_entropy, batches, steps=12, probes=3)
    ends = hessian_extremes(model, F.cross_entropy, batches)
    assert ends.smallest * (1 + 1e-9) <= found.nodes[0] <= found.nodes[-1] <= ends.largest * (1 + 1e-9)
    grid = torch.linspace(-5, 5, 2001).double()
    assert_close(torch.trapezoid(found.at(grid, 0.1), grid), torch.ones(()).double(), rtol=1e-6, atol=0)


def test_smoothness_of_a_quadratic() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0]])
    # The sum of squares of the weights, whose Hessian is 2; along the gradient they shrink by 1 - 0.2 part, part up to 4.
    found = smoothness(model, lambda y, _: y.square().sum(), [(torch.eye(2), None)], 0.1)
    assert_close(vars(found), {"low": 1.0, "high": 25.0, "predictive": 8.0, "beta": 2.0}, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["batch norm", "conditioned"])
def test_nothing_is_changed(name: str) -> None:
    model, batches = case(name)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hessian_extremes(model, F.cross_entropy, batches, dense=0)
    hessian_condition(mlp(), F.cross_entropy, batches)
    torch.set_rng_state(random)  # mlp() draws
    smoothness(model, F.cross_entropy, batches, 0.1)
    assert_close(model.state_dict(), state, atol=0, rtol=0)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_three_readings_of_conditioned_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4, bias=False).double(), torch.randn(20, 3).double()
    batches = [(x, torch.randn(20, 4).double())]
    norms, e = model.weight.norm(dim=1), torch.linalg.eigvalsh(x.T @ x)
    before, after = hessian_condition(model, F.mse_loss, batches, "constant")
    assert_close(before.condition, (e[-1] / e[0]).item())
    assert_close(after.condition, before.condition * (norms.max() / norms.min()).square().item())
    before, after = hessian_condition(model, F.mse_loss, batches, "plain")
    assert_close(after.condition, before.condition)  # a quadratic has one Hessian everywhere
    # At its targets the model is stationary, and scaling a row changes nothing.
    batches = [(x, x @ equilibrate(model.weight).detach().T)]
    assert hessian_condition(model, F.mse_loss, batches, "differentiated")[1].condition == math.inf
    model, batches = case("tanh")
    twin = copy.deepcopy(model)
    for layer in (twin[0], twin[2]):
        layer.weight.data = equilibrate(layer.weight.data)
    wanted = hessian_extremes(twin, F.cross_entropy, batches)
    assert_close(hessian_condition(model, F.cross_entropy, batches, "plain").after.largest, wanted.largest)


@pytest.mark.parametrize("factor", [2.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lanczos_of_a_multiple_of_the_identity(factor: float, dtype: torch.dtype) -> None:
    model, batches = nn.Linear(40, 1, bias=False).to(dtype), [(torch.eye(40).to(dtype), torch.zeros(40, 1))]
    found = hessian_extremes(model, lambda y, _: factor / 2 * y.square().sum() + y.sum(), batches, dense=0)
    assert_close((found.largest, found.smallest), (factor, factor), rtol=1e-6, atol=1e-6)
