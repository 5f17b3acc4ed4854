"""ScaleNorm: one length for all tokens, its scalar shared or not, and what it equals."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.rms_norm import RMSNorm
from normkit.activations.scale_norm import ScaleNorm, scale_norm
from normkit.core.errors import OptionError, ShapeError


def test_with_the_root_of_the_features_it_is_rms_norm() -> None:
    x = torch.randn(5, 7, 16, dtype=torch.float64)
    assert_close(ScaleNorm(16).double()(x), RMSNorm(16, eps=0.0).double()(x), rtol=1e-12, atol=1e-12)


def test_every_token_has_the_learned_length() -> None:
    norm = ScaleNorm(16).double()
    with torch.no_grad():
        norm.weight.fill_(2.5)
    y = norm(torch.randn(5, 7, 16, dtype=torch.float64) * 100)
    assert_close(y.norm(dim=-1), torch.full((5, 7), 2.5, dtype=torch.float64))


def test_eps_is_a_floor_of_the_norm() -> None:
    tiny = torch.full((1, 4), 1e-7, dtype=torch.float64)
    assert_close(scale_norm(tiny), tiny / 1e-5)
    for value in (0.0, 1e-7):
        x = torch.full((1, 4), value, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(scale_norm(x).sum(), x)
        assert_close(gradient, torch.full((1, 4), 1e5, dtype=torch.float64))


def test_one_scalar_may_be_shared_by_all_places() -> None:
    first = ScaleNorm(8)
    model = nn.Sequential(first, ScaleNorm(8, weight=first.weight), ScaleNorm(8))
    assert len(list(model.parameters())) == 2
    model(torch.randn(3, 8)).sum().backward()
    fresh = ScaleNorm(8)
    other = nn.Sequential(fresh, ScaleNorm(8, weight=fresh.weight), ScaleNorm(8))
    other.load_state_dict(model.state_dict())
    with pytest.raises(OptionError, match="scalar"):
        ScaleNorm(8, weight=nn.Parameter(torch.ones(8)))
    with pytest.raises(ShapeError, match="features=8"):
        first(torch.randn(2, 7))
