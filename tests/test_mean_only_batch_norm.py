"""Mean-only batch normalization: its memory, its gradient, and what it leaves to weight normalization."""

import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.mean_only_batch_norm import MeanOnlyBatchNorm
from normkit.weights.weight_norm import weight_norm


def test_it_is_batch_norm_times_the_deviation() -> None:
    x, like = torch.randn(4, 3, 5).double() * 2 + 7, nn.BatchNorm1d(3, eps=1e-30, affine=False).double()
    norm = MeanOnlyBatchNorm(3).double()
    assert_close(norm(x).detach(), like(x) * x.std((0, 2), correction=0).view(-1, 1))
    assert_close(norm.running_mean, like.running_mean)
    assert list(norm.state_dict()) == ["bias", "running_mean", "num_batches_tracked"]
    assert_close(norm.eval()(x), x - norm.running_mean.view(-1, 1))


def test_behind_weight_normalization_the_length_alone_sets_the_scale() -> None:
    x = torch.randn(64, 5).double() + 3
    model = nn.Sequential(weight_norm(nn.Linear(5, 4).double()), MeanOnlyBatchNorm(4).double())
    before = model(x)
    g, v = (model[0].parametrizations.weight.get_parameter(name) for name in ("original0", "original1"))
    v.data *= 9
    assert_close(model(x), before)
    g.data *= 9
    assert_close(model(x), 9 * before)


def test_refusals() -> None:
    without = MeanOnlyBatchNorm(3, bias=False, track_running_stats=False).eval()
    assert not without.state_dict()
    assert_close(without(torch.ones(2, 3)), torch.zeros(2, 3))
