"""Exemplar normalization: equal shares at the start, each normalizer at one corner, shares of each sample."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.exemplar_norm import ExemplarNorm, exemplar_norm
from normkit.activations.instance_norm import instance_norm
from normkit.activations.layer_norm import layer_norm
from normkit.core.errors import OptionError, ShapeError


def _image() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + torch.arange(3.0).view(3, 1, 1, 1)


def test_starts_as_the_mean_of_the_three() -> None:
    x, norm = _image(), ExemplarNorm(4).double()
    batch = BatchNorm(4).double()
    three = (instance_norm(x), layer_norm(x, 4, over="c *"), batch(x))
    assert_close(norm(x), sum(three) / 3)
    assert_close((norm.running_mean, norm.running_var), (batch.running_mean, batch.running_var))
    assert_close(norm.eval()(x), (three[0] + three[1] + batch.eval()(x)) / 3)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_one_logit_is_one_normalizer_with_its_own_weight_and_bias(k: int) -> None:
    x, norm = _image(), ExemplarNorm(4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        norm.logits.bias[k] = 1000.0
    w, b = norm.weight[k], norm.bias[k]
    wanted = (
        lambda: instance_norm(x, None, None, w, b),
        lambda: layer_norm(x, 4, w, b, over="c *"),
        lambda: w.view(4, 1, 1) * BatchNorm(4).double()(x) + b.view(4, 1, 1),
    )[k]()
    assert_close(norm(x), wanted)


def test_each_sample_has_shares_of_its_own() -> None:
    x, norm = _image(), ExemplarNorm(4, reduction=2).double()
    nn.init.normal_(norm.logits.weight, std=3.0)
    shares = norm.shares(norm.moments(x))
    assert shares.shape == (3, 3)
    assert_close(shares.sum(1), torch.ones(3, dtype=torch.float64))
    assert not torch.allclose(shares[0], shares[2])
    assert_close(norm(x), exemplar_norm(x, norm.moments(x), shares, norm.weight, norm.bias))


def test_a_large_mean_costs_no_accuracy() -> None:
    x, norm = torch.randn(3, 4, 12, 12) + 1e4, ExemplarNorm(4)
    # Means of 1e4 are known to half a unit in the last place, 1e4 * 2^-24 deviations.
    assert_close(norm(x).double(), norm(x.double()), rtol=0, atol=1e-2)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="one value for each statistic"):
        ExemplarNorm(4)(torch.ones(2, 4, 1, 1))
    with pytest.raises(ShapeError, match="got 3 channels"):
        ExemplarNorm(4)(torch.ones(2, 3, 5))
    with pytest.raises(OptionError, match="reduction=0"):
        ExemplarNorm(4, 0)
    x, norm = _image(), ExemplarNorm(4).double()
    with pytest.raises(ShapeError, match="wanted 3 for each of 3 samples"):
        exemplar_norm(x, norm.moments(x), torch.ones(3, 2), norm.weight, norm.bias)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0)])
def test_an_empty_batch_leaves_gradients_and_averages_finite(shape, training) -> None:
    norm = ExemplarNorm(4).train(training)
    norm(torch.randn(shape)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in norm.parameters() if parameter.grad is not None)
    assert_close((norm.running_mean, norm.running_var), (torch.zeros(4), torch.ones(4)), rtol=0, atol=0)
