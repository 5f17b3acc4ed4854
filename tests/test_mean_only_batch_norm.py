"""Mean-only batch normalization: its memory, its gradient, and what it leaves to weight normalization."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.mean_only_batch_norm import MeanOnlyBatchNorm, mean_only_batch_norm
from normkit.core.errors import OptionError, ShapeError
from normkit.weights.weight_norm import weight_norm


def test_it_is_batch_norm_times_the_deviation() -> None:
    x, like = torch.randn(4, 3, 5).double() * 2 + 7, nn.BatchNorm1d(3, eps=1e-30, affine=False).double()
    norm = MeanOnlyBatchNorm(3).double()
    assert_close(norm(x).detach(), like(x) * x.std((0, 2), correction=0).view(-1, 1))
    assert_close(norm.running_mean, like.running_mean)
    assert list(norm.state_dict()) == ["bias", "running_mean", "num_batches_tracked"]
    assert_close(norm.eval()(x), x - norm.running_mean.view(-1, 1))


def test_channels_last_and_the_cumulative_average() -> None:
    x, norm = torch.randn(4, 5, 3).double(), MeanOnlyBatchNorm(3, momentum=None, layout="n * c").double()
    norm(x)
    norm(x + 2)
    assert_close(norm.running_mean, x.mean((0, 1)) + 1)
    first = mean_only_batch_norm(x.movedim(-1, 1), training=True)
    assert_close(mean_only_batch_norm(x, training=True, layout="n * c"), first.movedim(1, -1))


def test_the_gradient_subtracts_its_mean() -> None:
    x, direction = torch.randn(4, 3, 5).double().requires_grad_(), torch.randn(4, 3, 5).double()
    for backend in ("reference", "closed"):
        y = mean_only_batch_norm(x, training=True, backend=backend)
        (gradient,) = torch.autograd.grad((y * direction).sum(), x)
        assert_close(gradient, direction - direction.mean((0, 2), keepdim=True))


def test_behind_weight_normalization_the_length_alone_sets_the_scale() -> None:
    x = torch.randn(64, 5).double() + 3
    model = nn.Sequential(weight_norm(nn.Linear(5, 4).double()), MeanOnlyBatchNorm(4).double())
    before = model(x)
    g, v = (model[0].parametrizations.weight.get_parameter(name) for name in ("original0", "original1"))
    v.data *= 9
    assert_close(model(x), before)
    g.data *= 9
    assert_close(model(x), 9 * before)


def test_a_broken_batch_leaves_the_running_mean() -> None:
    norm = MeanOnlyBatchNorm(2)
    norm(torch.tensor([[1.0, float("nan")], [3.0, 1.0]]))
    assert_close(norm.running_mean, torch.tensor([0.2, 0.0]))
    norm.reset_parameters()
    assert_close(norm.running_mean, torch.zeros(2))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="got 4 channels"):
        MeanOnlyBatchNorm(3)(torch.ones(2, 4))
    with pytest.raises(OptionError, match="layout='c n'"):
        MeanOnlyBatchNorm(3, layout="c n")
    with pytest.raises(OptionError, match="needs running_mean"):
        mean_only_batch_norm(torch.ones(2, 3))
    without = MeanOnlyBatchNorm(3, bias=False, track_running_stats=False).eval()
    assert not without.state_dict()
    assert_close(without(torch.ones(2, 3)), torch.zeros(2, 3))
