"""Exemplar normalization: equal shares at the start, each normalizer at one corner, shares of each sample."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.exemplar_norm import ExemplarNorm, exemplar_norm
from normkit.activations.instance_norm import instance_norm
from normkit.activations.layer_norm import layer_norm
from normkit.core.errors import ShapeError


def _image() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + torch.arange(3.0).view(3, 1, 1, 1)


def test_starts_as_the_mean_of_the_three() -> None:
    x, norm = _image(), ExemplarNorm(4).double()
    batch = BatchNorm(4).double()
    three = (instance_norm(x), layer_norm(x, 4, over="c *"), batch(x))
    assert_close(norm(x), sum(three) / 3)
    assert_close((norm.running_mean, norm.running_var), (batch.running_mean, batch.running_var))
    assert_close(norm.eval()(x), (three[0] + three[1] + batch.eval()(x)) / 3)


def test_each_sample_has_shares_of_its_own() -> None:
    x, norm = _image(), ExemplarNorm(4, reduction=2).double()
    nn.init.normal_(norm.logits.weight, std=3.0)
    shares = norm.shares(norm.moments(x))
    assert shares.shape == (3, 3)
    assert_close(shares.sum(1), torch.ones(3, dtype=torch.float64))
    assert not torch.allclose(shares[0], shares[2])
    assert_close(norm(x), exemplar_norm(x, norm.moments(x), shares, norm.weight, norm.bias))


def test_refusals() -> None:
    x, norm = _image(), ExemplarNorm(4).double()
    with pytest.raises(ShapeError, match="wanted 3 for each of 3 samples"):
        exemplar_norm(x, norm.moments(x), torch.ones(3, 2), norm.weight, norm.bias)
