"""Conditional normalization: the plain norm at the start, classes, mixtures, vectors, maps, running averages."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.conditional_norm import ConditionalNorm, SpatiallyAdaptiveNorm, conditional_norm
from normkit.activations.instance_norm import instance_norm
from normkit.core.errors import OptionError, ShapeError


def _image() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + 1


def _random(**options: object) -> ConditionalNorm:
    norm = ConditionalNorm(4, **options).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def test_starts_as_the_plain_norm() -> None:
    x, classes, vectors = _image(), torch.tensor([0, 2, 1]), torch.randn(3, 7, dtype=torch.float64)
    for over, wanted in (("*", instance_norm(x)), ("n *", BatchNorm(4).double()(x))):
        assert_close(ConditionalNorm(4, classes=3, over=over).double()(x, classes), wanted)
        assert_close(ConditionalNorm(4, features=7, over=over).double()(x, vectors), wanted)


def test_each_class_has_its_weight_and_bias() -> None:
    x, norm, classes = _image(), _random(classes=5), torch.tensor([4, 0, 4])
    for n, k in enumerate(classes.tolist()):
        assert_close(norm(x, classes)[n : n + 1], instance_norm(x[n : n + 1], None, None, norm.weight[k], norm.bias[k]))


def test_shares_mix_classes() -> None:
    x, norm = _image(), _random(classes=2)
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    found = norm(x, shares)
    assert_close(found[:2], norm(x, torch.tensor([0, 1, 0]))[:2])
    whole = [norm(x, torch.full((3,), k))[2] for k in range(2)]
    assert_close(found[2], 0.25 * whole[0] + 0.75 * whole[1])


def test_running_averages_are_batch_norms() -> None:
    norm, batch_norm = _random(features=2, over="n *", momentum=None), BatchNorm(4, momentum=None).double()
    condition = torch.randn(3, 2, dtype=torch.float64)
    x = _image()
    for _ in range(2):
        x = x + 1
        norm(x, condition)
        batch_norm(x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(norm, key), getattr(batch_norm, key))
    gain, shift = (1 + condition @ norm.weight)[..., None, None], (condition @ norm.bias)[..., None, None]
    assert_close(norm.eval()(x, condition), gain * batch_norm.eval()(x) + shift)


def test_a_map_gives_each_position_its_weight_and_bias() -> None:
    x, norm = _image(), SpatiallyAdaptiveNorm(4, 2, hidden=3).double()
    small = torch.rand(3, 2, 2, 3, dtype=torch.float64)
    labels = F.interpolate(small, (5, 6), mode="nearest")
    hidden = F.conv2d(labels, norm.shared.weight, norm.shared.bias, padding=1).relu()
    gain = F.conv2d(hidden, norm.gain.weight, norm.gain.bias, padding=1)
    shift = F.conv2d(hidden, norm.shift.weight, norm.shift.bias, padding=1)
    wanted = F.batch_norm(x, None, None, training=True) * (1 + gain) + shift
    assert_close(norm(x, labels), wanted)
    assert_close(norm(x, small), wanted)


def test_over_the_sample_a_map_layer_keeps_no_state() -> None:
    x, norm = _image(), SpatiallyAdaptiveNorm(4, 2, hidden=3, over="*").double()
    labels = torch.rand(3, 2, 5, 6, dtype=torch.float64)
    assert not dict(norm.named_buffers())
    assert_close(norm.eval()(x, labels), norm.train()(x, labels))
    assert_close(norm(x, labels)[:1], norm(x[:1], labels[:1]))


def test_the_function_takes_both() -> None:
    x, weight, bias = _image(), torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    maps = [p[..., None, None].expand(3, 4, 5, 6) for p in (weight, bias)]
    assert_close(conditional_norm(x, weight, bias), conditional_norm(x, *maps))
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    found = conditional_norm(x, weight, bias, mean, var, training=False, over="n *")
    assert_close(found, maps[0] * x / (1 + 1e-5) ** 0.5 + maps[1])


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="wanted 7 features for each sample"):
        _random(features=7)(_image(), torch.ones(3, 6))
    with pytest.raises(ShapeError, match="one class, or one share"):
        _random(classes=2)(_image(), torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match="one value for each statistic"):
        _random(classes=2)(torch.ones(3, 4, 1), torch.tensor([0, 1, 1]))
    with pytest.raises(ShapeError, match="3 samples and 2 channels of the map"):
        SpatiallyAdaptiveNorm(4, 2).double()(_image(), torch.ones(3, 3, 5, 6))
    with pytest.raises(OptionError, match="keeps no running statistics"):
        conditional_norm(_image(), torch.ones(3, 4), torch.ones(3, 4), torch.zeros(4), torch.ones(4))
