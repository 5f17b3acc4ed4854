"""Spectral normalization beside torch's, and against the singular value decomposition."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.testing import assert_close

from normkit.weights.spectral_norm import SpectralNorm, divide_by_sigma, spectral_norm

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv 2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
}
# The orders of summation differ by a few units in the last place.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 3}, {"dim": 1}, {"dim": -1}], ids=str)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_equals_torch(make, shape, options, dtype) -> None:
    ours = make().to(dtype)
    other = copy.deepcopy(ours)
    torch.manual_seed(1)
    spectral_norm(ours, **options)
    torch.manual_seed(1)
    theirs.spectral_norm(other, **options)
    exact = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    assert list(ours.state_dict()) == list(other.state_dict())
    assert_close(ours.state_dict(), other.state_dict(), **exact)
    other.load_state_dict(ours.state_dict())
    ours.load_state_dict(other.state_dict())
    x = torch.randn(shape, dtype=dtype)
    for train in (True, True, False, True):
        ours.train(train)
        other.train(train)
        y, wanted = ours(x), other(x)
        assert_close(y, wanted, **exact)
        g = torch.randn_like(y)
        got = torch.autograd.grad((y * g).sum(), list(ours.parameters()))
        assert_close(got, torch.autograd.grad((wanted * g).sum(), list(other.parameters())), **exact)
        assert_close(ours.state_dict(), other.state_dict(), **exact)


def test_two_uses_before_one_backward() -> None:
    layer = spectral_norm(nn.Linear(5, 4))
    (layer(torch.randn(3, 5)).sum() - layer(torch.randn(3, 5)).sum()).backward()
    assert layer.parametrizations.weight.original.grad is not None  # pyright: ignore


def test_the_largest_singular_value_becomes_one() -> None:
    layer = spectral_norm(nn.Conv2d(3, 4, 3).double(), n_power_iterations=200)
    values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
    raw = torch.linalg.svdvals(layer.parametrizations.weight.original.detach().flatten(1))  # pyright: ignore
    assert_close(values, raw / raw[0])


def test_a_vector_is_divided_by_its_norm() -> None:
    part = SpectralNorm(torch.ones(2))
    assert_close(part(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
    assert not list(part.buffers())


def test_convergence_is_the_squared_ratio_of_singular_values() -> None:
    w = torch.diag(torch.tensor([2.0, 1.0, 0.5])).double()
    part = SpectralNorm(w)
    part._u.copy_(torch.ones(3) / 3**0.5)
    part._v.copy_(torch.ones(3) / 3**0.5)
    # Each iteration multiplies by W and W^T, and so the second part of v by (1 / 2)^2.
    for k in range(1, 6):
        part(w)
        assert_close(part._v[1] / part._v[0], torch.tensor(0.25**k).double())


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_exact_holds_the_largest_singular_value_at_one_at_each_use(make, shape) -> None:
    layer = spectral_norm(make().double(), exact=True)
    raw = layer.parametrizations.weight.original
    dim = int("Transpose" in repr(layer))
    assert list(layer.state_dict()) == list(spectral_norm(make()).state_dict())
    for train in (True, False):
        raw.data.copy_(torch.randn_like(raw) * 5)
        layer.train(train)
        found = layer.weight.movedim(dim, 0).flatten(1)
        assert_close(torch.linalg.svdvals(found.detach())[0], torch.tensor(1.0).double())
    assert layer(torch.randn(shape).double()).isfinite().all()


def test_exact_is_differentiable_to_second_order() -> None:
    part, w = SpectralNorm(torch.randn(3, 4).double(), exact=True), torch.randn(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(part, w)
    assert torch.autograd.gradgradcheck(part, w)
    u, _, vh = torch.linalg.svd(w.detach())
    g = torch.randn(3, 4).double()
    (found,) = torch.autograd.grad((part(w) * g).sum(), w)
    (wanted,) = torch.autograd.grad((divide_by_sigma(w, u[:, 0], vh[0]) * g).sum(), w)
    assert_close(found, wanted)
    zero = torch.zeros(2, 2, requires_grad=True)
    assert torch.autograd.grad(SpectralNorm(zero, exact=True)(zero).sum(), zero)[0].isfinite().all()
    assert SpectralNorm(torch.ones(2, 2), exact=True)(torch.ones(2, 2).bfloat16()).dtype == torch.bfloat16
