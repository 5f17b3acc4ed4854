"""Generalized divisive normalization: where it starts, positivity, its inverse."""

import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.gdn import GDN


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
