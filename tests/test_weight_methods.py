"""Weight normalization, standardization and spectral normalization beside torch, and what torch lacks."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.testing import assert_close

from foreign_norms import random_
from normkit.core.errors import OptionError
from normkit.weights.layout import WeightLayout
from normkit.weights.spectral_norm import SpectralNorm, power_iteration, power_iteration_square, spectral_norm
from normkit.weights.weight_norm import rescale, weight_norm
from normkit.weights.weight_standardization import PUBLISHED, WeightStandardization, standardize, weight_standardization

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv 2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
}
# The orders of summation differ by a few units in the last place.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


BESIDE: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    **{f"weight norm {dim}": (weight_norm, theirs.weight_norm, {"dim": dim}) for dim in (0, 1, -1, -2, None)},
    **{
        f"spectral norm {options}": (spectral_norm, theirs.spectral_norm, options)
        for options in ({}, {"n_power_iterations": 3}, {"dim": 1}, {"dim": -1})
    },
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", BESIDE)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_equals_torch(make, shape, method, dtype) -> None:
    put, like, options = BESIDE[method]
    ours = make().to(dtype)
    other, exact = copy.deepcopy(ours), {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for layer, on in ((ours, put), (other, like)):
        torch.manual_seed(1)
        on(layer, **options)
    assert list(ours.state_dict()) == list(other.state_dict())
    assert_close(ours.state_dict(), other.state_dict(), **exact)
    random_(other)
    ours.load_state_dict(other.state_dict())
    other.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=dtype)
    for train in (True, True, False, True):
        y, wanted = ours.train(train)(x), other.train(train)(x)
        assert_close(y, wanted, **exact)
        g = torch.randn_like(y)
        pairs = ((y, ours), (wanted, other))
        assert_close(*(torch.autograd.grad(of, list(on.parameters()), g) for of, on in pairs), **exact)
        assert_close(ours.state_dict(), other.state_dict(), **exact)


def test_older_checkpoints_load() -> None:
    layer = weight_norm(nn.Linear(3, 2))
    state = {"weight_g": torch.full((2, 1), 5.0), "weight_v": torch.eye(2, 3), "bias": torch.zeros(2)}
    nn.Sequential(layer).load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert_close(layer.weight.detach(), 5 * torch.eye(2, 3))


def test_one_axis() -> None:
    v = torch.tensor([3.0, -4.0])
    assert_close(rescale(torch.tensor(10.0), v, None), torch.tensor([6.0, -8.0]))
    assert_close(rescale(torch.tensor([2.0, 3.0]), v, 0), torch.tensor([2.0, -3.0]))


def test_the_published_forms() -> None:
    w = torch.randn(4, 3, 2, 2).double()
    rest = w - w.mean((1, 2, 3), keepdim=True)
    var = rest.square().mean((1, 2, 3), keepdim=True)
    unbiased = var * 12 / 11
    wanted = {
        "paper": rest / (var + 1e-5).sqrt(),
        "authors": rest / (unbiased.sqrt() + 1e-5),
        "batch_channel": rest / (unbiased + 1e-5).sqrt(),
        "timm": rest / (var + 1e-6).sqrt(),
    }
    assert wanted.keys() == PUBLISHED.keys()
    for name, options in PUBLISHED.items():
        assert_close(standardize(w, **options), wanted[name], rtol=1e-12, atol=1e-12)
        layer = weight_standardization(nn.Conv2d(3, 4, 2).double(), **options)
        layer.weight = w
        assert_close(layer.weight.detach(), wanted[name], rtol=1e-12, atol=1e-12)
        assert f"{name}``" in (WeightStandardization.__doc__ or "")
    assert_close(standardize(w), wanted["paper"])
    timm = F.batch_norm(w.reshape(1, 4, -1), None, None, training=True, momentum=0.0, eps=1e-6).view_as(w)
    assert_close(wanted["timm"], timm)


def test_a_constant_row_becomes_zero_and_one_weight_in_the_first_axis_is_no_unit() -> None:
    assert_close(standardize(torch.full((1, 4), 7.0)), torch.zeros(1, 4))
    assert standardize(torch.randn(2, 6, 1), layout=WeightLayout(output_axis=1)).shape == (2, 6, 1)


def test_spectral_norms_of_two_uses_of_a_vector_of_zeros_and_of_halves() -> None:
    layer, part, zero = (
        spectral_norm(nn.Linear(5, 4)),
        SpectralNorm(torch.ones(2)),
        torch.zeros(2, 2, requires_grad=True),
    )
    (layer(torch.randn(3, 5)).sum() - layer(torch.randn(3, 5)).sum()).backward()
    assert layer.parametrizations.weight.original.grad is not None  # pyright: ignore
    assert_close(part(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))  # divided by its norm
    assert not list(part.buffers())
    assert torch.autograd.grad(SpectralNorm(zero, exact=True)(zero).sum(), zero)[0].isfinite().all()
    assert SpectralNorm(torch.ones(2, 2), exact=True)(torch.ones(2, 2).bfloat16()).dtype == torch.bfloat16


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


NOT_NORMAL = torch.tensor([[1.0, 5.0], [0.0, 0.5]], dtype=torch.float64)


def test_the_printed_loop_finds_the_radius_and_two_vectors_the_norm() -> None:
    radius, x = power_iteration_square(NOT_NORMAL, 1e-12)
    u, v = power_iteration(NOT_NORMAL, iterations=50)
    assert_close(radius, torch.tensor(1.0).double())
    assert_close(NOT_NORMAL @ x, x, rtol=0, atol=1e-9)
    assert_close(u @ NOT_NORMAL @ v, torch.linalg.matrix_norm(NOT_NORMAL, 2))
    assert round((u @ NOT_NORMAL @ v).item(), 4) == 5.1225


def test_of_a_symmetric_matrix_both_agree_and_a_sign_that_alternates_is_convergence() -> None:
    q = torch.linalg.qr(torch.randn(4, 4).double())[0]
    w = q @ torch.diag(torch.tensor([-3.0, 2.0, 1.0, 0.5]).double()) @ q.T
    assert_close(power_iteration_square(w, 1e-10)[0], torch.tensor(3.0).double())
    u, v = power_iteration(w, iterations=60)
    assert_close(u @ w @ v, torch.tensor(3.0).double())


def test_what_is_kept_saves_iterations() -> None:
    w = torch.diag(torch.tensor([3.0, 2.9, 1.0])).double()
    _, x = power_iteration_square(w, 1e-8)
    changed = w + 1e-6 * torch.eye(3)
    assert_close(power_iteration_square(changed, 1e-6, x, limit=1)[0], torch.tensor(3.0 + 1e-6).double())
    with pytest.raises(OptionError, match="still moves"):
        power_iteration_square(changed, 1e-6, torch.ones(3), limit=1)


def test_zero_and_complex_eigenvalues() -> None:
    assert power_iteration_square(torch.zeros(2, 2))[0] == 0
    assert all(vector.isfinite().all() for vector in power_iteration(torch.zeros(2, 3)))
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    with pytest.raises(OptionError, match="no dominant real eigenvalue"):
        power_iteration_square(turn, limit=100)
    u, v = power_iteration(turn)
    assert math.isclose(u @ turn @ v, 1.0, rel_tol=1e-6)
