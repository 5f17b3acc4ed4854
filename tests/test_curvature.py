"""Hessian and Gauss-Newton matrix against torch's own derivatives; Lanczos against dense eigenvalues."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.core.errors import OptionError
from normkit.diagnostics import curvature
from normkit.diagnostics.curvature import Extremes, hessian, hessian_condition, hessian_extremes, smoothness
from normkit.diagnostics.spectrum import quadrature
from normkit.surgery.bake import bake
from normkit.weights.weight_conditioning import equilibrate, weight_conditioning
from normkit.weights.weight_norm import weight_norm


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        return self.last(self.mix(x, x, x, need_weights=False)[0].mean(1))


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 3))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "tanh": lambda: (mlp(), torch.randn(12, 4)),
    "batch norm": lambda: (mlp(nk.BatchNorm(5)), torch.randn(12, 4)),
    "evaluated": lambda: (mlp(nn.BatchNorm1d(5), nn.Dropout(0.5)).eval(), torch.randn(12, 4)),
    "convolution": lambda: (nn.Sequential(nn.Conv2d(2, 3, 2), nk.GroupNorm(3, 3), nn.Flatten(), nn.Linear(12, 3)),
                            torch.randn(12, 2, 3, 3)),
    "attention": lambda: (Attention(), torch.randint(5, (12, 3))),
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
    assert_close(
        hessian(model, F.cross_entropy, [(x, y)], matrix="ggn"), first.T @ outer @ first, rtol=1e-9, atol=1e-10
    )
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
        both = [
            hessian_extremes(model, F.mse_loss, [(x, x[:, :1])], matrix=matrix, dense=n, tolerance=1e-10)
            for n in (0, 99)
        ]
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
        assert_close(
            (weights * nodes**power).sum(), unit @ torch.linalg.matrix_power(a, power) @ unit, rtol=1e-9, atol=1e-9
        )
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


class Checkpointed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(super().forward, input.requires_grad_(), use_reentrant=True)


def test_refusals() -> None:
    model, batches = case("tanh")
    with pytest.raises(OptionError, match="use_reentrant=False"):
        hessian(
            nn.Sequential(Checkpointed(4, 3), nn.Linear(3, 3)), F.cross_entropy, [(torch.randn(2, 4), torch.arange(2))]
        )
    for whole in (0, 1000):
        with pytest.raises(OptionError, match="not finite"):
            hessian_extremes(model, lambda y, _: math.nan * y.square().sum(), batches, dense=whole)
    with pytest.raises(OptionError, match="walked only once"):
        hessian(model, F.cross_entropy, iter(batches))
    with pytest.raises(OptionError, match="no batches"):
        hessian(model, F.cross_entropy, [])
    with pytest.raises(OptionError, match=r"did not bring an eigenvalue.*larger limit="):
        hessian_extremes(model, F.cross_entropy, batches, dense=0, tolerance=1e-14, limit=20)
    with pytest.raises(OptionError, match=r"wanted 'constant', .*did you mean 'constant'"):
        hessian_condition(model, F.cross_entropy, batches, "constnt")
    with pytest.raises(OptionError, match="matrix='fisher'"):
        hessian(model, F.cross_entropy, batches, matrix="fisher")
    with pytest.raises(OptionError, match="no parameter of the model is trained"):
        hessian(model.requires_grad_(False), F.cross_entropy, batches)
