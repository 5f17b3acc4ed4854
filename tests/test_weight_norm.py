"""Weight normalization beside torch's, and what torch's lacks."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.weights.weight_norm import WeightNorm, rescale, weight_norm

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv 2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
}
# The orders of summation differ by a few units in the last place.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1, -2, None])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_equals_torch(make, shape, dim, dtype, train) -> None:
    ours = make().to(dtype).train(train)
    other = copy.deepcopy(ours)
    weight_norm(ours, dim=dim)
    theirs.weight_norm(other, dim=dim)
    assert list(ours.state_dict()) == list(other.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours.load_state_dict(other.state_dict())
    other.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=dtype)
    y, wanted = ours(x), other(x)
    exact = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    assert_close(y, wanted, **exact)
    g = torch.randn_like(y)
    got = torch.autograd.grad((y * g).sum(), list(ours.parameters()))
    assert_close(got, torch.autograd.grad((wanted * g).sum(), list(other.parameters())), **exact)


def test_the_function_is_unchanged_at_first() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    before = layer(x)
    assert_close(weight_norm(layer)(x), before)


def test_older_checkpoints_load() -> None:
    layer = weight_norm(nn.Linear(3, 2))
    state = {"weight_g": torch.full((2, 1), 5.0), "weight_v": torch.eye(2, 3), "bias": torch.zeros(2)}
    nn.Sequential(layer).load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert_close(layer.weight.detach(), 5 * torch.eye(2, 3))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(-4, 3))
def test_slices_have_the_lengths(shape, dim) -> None:
    if not -len(shape) <= dim < len(shape) or dim == -1:
        return
    v = torch.randn(shape, dtype=torch.float64) + 0.1
    g = torch.rand([n if d == dim % len(shape) else 1 for d, n in enumerate(shape)], dtype=torch.float64)
    others = [d for d in range(len(shape)) if d != dim % len(shape)]
    assert_close(torch.linalg.vector_norm(rescale(g, v, dim), dim=others, keepdim=True), g)


def test_one_axis() -> None:
    v = torch.tensor([3.0, -4.0])
    assert_close(rescale(torch.tensor(10.0), v, None), torch.tensor([6.0, -8.0]))
    assert_close(rescale(torch.tensor([2.0, 3.0]), v, 0), torch.tensor([2.0, -3.0]))


def test_lengths_never_fall_under_gradient_descent() -> None:
    layer = weight_norm(nn.Linear(5, 4).double())
    v, x = layer.parametrizations.weight.original1, torch.randn(8, 5).double()  # pyright: ignore
    for _ in range(5):
        before = v.detach().norm(dim=1)
        (d,) = torch.autograd.grad(layer(x).sin().sum(), [v])
        with torch.no_grad():
            v -= 0.3 * d
        assert_close(v.detach().norm(dim=1), (before**2 + 0.09 * d.norm(dim=1) ** 2).sqrt())


def test_refusals() -> None:
    with pytest.raises(OptionError, match="dim=2 of a weight of 2 axes"):
        weight_norm(nn.Linear(3, 2), dim=2)
    with pytest.raises(OptionError, match="must come first"):
        weight_norm(weight_norm(nn.Linear(3, 2)))
    assert "dim=0" in repr(WeightNorm())
