"""Generalized divisive normalization: where it starts, positivity, its inverse."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.gdn import GDN, gdn
from normkit.core.errors import OptionError, ShapeError


def test_starts_at_beta_one_and_a_tenth_of_the_identity() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    # Beside the diagonal stands 2^-36 in place of 0.
    assert_close(GDN(3).double()(x), x / (1 + 0.1 * x**2).sqrt(), rtol=1e-7, atol=0)
    assert_close(GDN(3, inverse=True).double()(x), x * (1 + 0.1 * x**2).sqrt(), rtol=1e-7, atol=0)


def test_every_weight_can_leave_its_start() -> None:
    norm = GDN(3)
    norm(torch.randn(4, 3, 5)).square().sum().backward()
    assert (norm.gamma.grad != 0).all()
    assert (norm.beta.grad != 0).all()


def test_stays_real_whatever_the_parameters() -> None:
    norm = GDN(3)
    nn.init.zeros_(norm.beta)
    nn.init.constant_(norm.gamma, -1e-12)
    assert norm(torch.randn(4, 3, 5) * 1e3).isfinite().all()
    assert norm(torch.zeros(4, 3, 5)).isfinite().all()


def test_equals_a_convolution_of_the_energy() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    beta, gamma = torch.rand(3, dtype=torch.float64) + 0.1, torch.rand(3, 3, dtype=torch.float64)
    energy = nn.functional.conv2d(x**2, gamma[..., None, None], beta)
    assert_close(gdn(x, beta, gamma), x / energy.sqrt())
    assert_close(gdn(x, beta, gamma, inverse=True), x * energy.sqrt())


def test_refusals() -> None:
    with pytest.raises(OptionError, match="beta_min=0"):
        GDN(3, beta_min=0.0)
    with pytest.raises(OptionError, match="gamma_init=-1"):
        GDN(3, gamma_init=-1.0)
    with pytest.raises(ShapeError, match="got 4 channels"):
        GDN(3)(torch.ones(2, 4, 5))
