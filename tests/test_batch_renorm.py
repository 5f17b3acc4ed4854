"""Batch renormalization: its limits, its gradient, its schedule, and batch normalization's checkpoints."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.activations.batch_renorm import BatchRenorm, RenormSchedule

UNBOUNDED = RenormSchedule.constant(math.inf, math.inf)


def _x() -> Tensor:
    return torch.randn(6, 3, 5, dtype=torch.float64) * 2 + 3


def _norm(schedule: RenormSchedule, **options) -> BatchRenorm:
    norm = BatchRenorm(3, schedule=schedule, **options).double()
    with torch.no_grad():
        norm.weight.normal_(1)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_std.uniform_(0.5, 2)
    return norm


def test_without_bounds_training_is_evaluation_while_gradients_see_the_batch() -> None:
    x, norm = _x().requires_grad_(), _norm(UNBOUNDED)
    wanted = copy.deepcopy(norm).eval()(x)
    assert_close(norm(x), wanted)
    (gradient,) = torch.autograd.grad((norm(x) * torch.randn_like(x)).sum(), x)
    assert_close(gradient.sum((0, 2)), torch.zeros(3, dtype=x.dtype), rtol=0, atol=1e-12)


def test_the_correction_is_held_constant_in_the_gradient() -> None:
    x, norm, direction = _x().requires_grad_(), _norm(RenormSchedule.constant(1.2, 0.5)), torch.randn(6, 3, 5).double()
    std, mean = torch.std_mean(x, (0, 2), correction=0, keepdim=True)
    std = (std.square() + norm.eps).sqrt()
    old_mean, old_std = norm.running_mean.clone().view(-1, 1), norm.running_std.clone().view(-1, 1)
    r = (std / old_std).clamp(1 / 1.2, 1.2).detach()
    d = ((mean - old_mean) / old_std).clamp(-0.5, 0.5).detach()
    wanted = norm.weight.view(-1, 1) * ((x - mean) / std * r + d) + norm.bias.view(-1, 1)
    found = norm(x)
    assert_close(found, wanted)
    inputs = (x, norm.weight, norm.bias)
    assert_close(
        torch.autograd.grad((found * direction).sum(), inputs), torch.autograd.grad((wanted * direction).sum(), inputs)
    )


def test_running_statistics_are_the_mean_and_the_deviation() -> None:
    x, norm = _x(), _norm(UNBOUNDED, momentum=0.3)
    mean, std = norm.running_mean.clone(), norm.running_std.clone()
    norm(x)
    assert_close(norm.running_mean, 0.7 * mean + 0.3 * x.mean((0, 2)))
    assert_close(norm.running_std, 0.7 * std + 0.3 * (x.var((0, 2), correction=0) + norm.eps).sqrt())
    assert norm.num_batches_tracked == 1
    norm.reset_parameters()
    assert_close(norm.state_dict(), BatchRenorm(3).double().state_dict())


def test_the_schedule_opens_the_bounds_with_the_steps() -> None:
    schedule = RenormSchedule.over(100)
    assert (schedule.start, schedule.r_end, schedule.d_end) == (10, 80, 50)
    for step, r_max, d_max in ((0, 1, 0), (10, 1, 0), (30, 1 + 2 * 20 / 70, 2.5), (50, 1 + 2 * 40 / 70, 5), (99, 3, 5)):
        assert schedule(step) == pytest.approx((r_max, d_max))
        assert_close(schedule(torch.tensor(step)), tuple(map(torch.tensor, (float(r_max), float(d_max)))))
    x, norm, like = (
        _x() + 20,
        _norm(RenormSchedule(start=1, r_end=2, d_end=2)),
        nn.BatchNorm1d(3, affine=False).double(),
    )
    like.weight, like.bias = norm.weight, norm.bias
    assert_close(norm(x), like(x))
    assert_close(norm(x), like(x))
    norm.num_batches_tracked.fill_(100)
    assert (norm(x) - like(x)).abs().max() > 1


def test_batch_norms_checkpoint_loads() -> None:
    x, like = _x(), nn.BatchNorm1d(3).double()
    like(x)
    norm = nn.Sequential(BatchRenorm(3)).double()
    norm.load_state_dict(nn.Sequential(like).state_dict())
    assert_close(norm.eval()(x), like.eval()(x))


def test_explain_names_no_kernel_in_evaluation() -> None:
    norm = BatchRenorm(3)
    assert "* r + d" in str(norm.explain(torch.randn(4, 3)))
    text = str(norm.eval().explain(torch.randn(4, 3)))
    assert "(x - running_mean) / running_std" in text
    assert "back end: reference" in text
