"""Batch-channel normalization is batch then group normalization; estimated statistics move with the batch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.activations.batch_channel_norm import BatchChannelNorm, EstBatchNorm, batch_channel_norm, est_batch_norm


def _x() -> Tensor:
    return torch.randn(6, 4, 5, 3, dtype=torch.float64) * 2 + 3


def _random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0)
    return module.double()


def _estimating(channels: int) -> BatchChannelNorm:
    return BatchChannelNorm(channels, 2, estimate=True)


def _group(z: Tensor, norm: BatchChannelNorm) -> Tensor:
    weight, bias = (value.repeat_interleave(2).view(-1, 1, 1) for value in (norm.group_weight, norm.group_bias))
    return F.group_norm(z, 2) * weight + bias


@pytest.mark.parametrize("training", [True, False])
def test_is_batch_norm_then_group_norm_with_an_affine_per_group(training: bool) -> None:
    x, norm, like = _x().requires_grad_(), _random(BatchChannelNorm(4, 2)), nn.BatchNorm2d(4).double()
    norm(_x())
    like.load_state_dict(norm.state_dict(), strict=False)
    norm.train(training)
    like.train(training)
    y, wanted = norm(x), _group(like(x), norm)
    assert_close(y, wanted)
    direction = torch.randn_like(x)
    gradients = [torch.autograd.grad((value * direction).sum(), x)[0] for value in (y, wanted)]
    assert_close(*gradients)
    assert_close(norm.running_var, like.running_var)
    assert norm.group_weight.shape == (2,)


def test_estimated_statistics_by_hand() -> None:
    norm = _random(EstBatchNorm(4, momentum=0.3))
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for _ in range(3):
        x = _x()
        fresh = (x - mean.view(-1, 1, 1)).square().mean((0, 2, 3))
        mean, var = 0.7 * mean + 0.3 * x.mean((0, 2, 3)), 0.7 * var + 0.3 * fresh
        wanted = F.batch_norm(x, mean, var, norm.weight, norm.bias)
        assert_close(norm(x), wanted)
        assert_close(copy.deepcopy(norm).eval()(x), wanted)
    assert_close((norm.running_mean, norm.running_var), (mean, var))


def test_gradients_do_not_see_the_estimates_and_survive_another_forward() -> None:
    x, norm = _x().requires_grad_(), _random(EstBatchNorm(4))
    y = norm(x)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    norm(_x())  # moves the statistics in place
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient, scale.detach().view(-1, 1, 1).expand_as(x))


def test_micro_batches_of_one_image() -> None:
    x, norm = _x(), _random(BatchChannelNorm(4, 2, estimate=True))
    like = EstBatchNorm(4).double()
    like.load_state_dict({k: v for k, v in norm.state_dict().items() if "group" not in k})
    for image in x.split(1):
        assert_close(norm(image), _group(like(image), norm))
    assert EstBatchNorm(4)(torch.randn(1, 4)).isfinite().all()


def test_functions_and_reset() -> None:
    x, norm, est = _x(), _random(BatchChannelNorm(4, 2)), _random(EstBatchNorm(4))
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    found = batch_channel_norm(x, 2, mean, var, norm.weight, norm.bias, norm.group_weight, norm.group_bias, True)
    assert_close(found, norm(x))
    assert_close((mean, var), (norm.running_mean, norm.running_var))
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    assert_close(est_batch_norm(x, mean, var, est.weight, est.bias, True), est(x))
    assert_close((mean, var), (est.running_mean, est.running_var))
    norm.reset_parameters()
    assert_close(norm.state_dict(), BatchChannelNorm(4, 2).double().state_dict())
    bare = BatchChannelNorm(4, 2, affine=False).double()
    assert not list(bare.parameters())
    bare(x)


@pytest.mark.parametrize(
    "make", [EstBatchNorm, lambda c: BatchChannelNorm(c, 2), _estimating], ids=["estimated", "batch", "both"]
)
def test_update_bn_gives_the_statistics_of_all_batches(make) -> None:
    norm, batches = make(4).double(), [_x() + step for step in range(3)]
    norm.running_mean.fill_(7.0)
    torch.optim.swa_utils.update_bn(batches, norm)
    assert norm.momentum == 0.1
    whole = torch.cat(batches)
    assert_close(norm.running_mean, whole.mean((0, 2, 3)))
    if isinstance(norm, BatchChannelNorm) and not norm.estimate:  # as batch normalization
        assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    else:
        assert_close(norm.running_var, whole.var((0, 2, 3), correction=0))
