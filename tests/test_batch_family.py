"""What the kin of batch normalization equal, and what they remember; ghost batches of all sizes."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from foreign_norms import random_
from normkit import BatchChannelNorm, BatchGroupNorm, BatchRenorm, EstBatchNorm, MeanOnlyBatchNorm
from normkit.activations.ghost_batch_norm import GhostBatchNorm, ghost_batch_norm
from normkit.functional import RenormSchedule, batch_channel_norm, est_batch_norm, example_weighing


def test_it_is_batch_norm_times_the_deviation() -> None:
    x, like = torch.randn(4, 3, 5).double() * 2 + 7, nn.BatchNorm1d(3, eps=1e-30, affine=False).double()
    norm = MeanOnlyBatchNorm(3).double()
    assert_close(norm(x).detach(), like(x) * x.std((0, 2), correction=0).view(-1, 1))
    assert_close(norm.running_mean, like.running_mean)
    assert_close(norm.eval()(x), x - norm.running_mean.view(-1, 1))


def test_without_a_momentum_the_mean_is_cumulative() -> None:
    x, norm = torch.randn(4, 3, 5).double(), MeanOnlyBatchNorm(3, momentum=None).double()
    norm(x)
    norm(x + 2)
    assert_close(norm.running_mean, x.mean((0, 2)) + 1)


def test_without_bias_and_statistics() -> None:
    without = MeanOnlyBatchNorm(3, bias=False, track_running_stats=False).eval()
    assert not without.state_dict()
    assert_close(without(torch.ones(2, 3)), torch.zeros(2, 3))


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
    assert_close(*(torch.autograd.grad((y * direction).sum(), inputs) for y in (found, wanted)))


def test_running_statistics_are_the_mean_and_the_deviation() -> None:
    x, norm = _x(), _norm(UNBOUNDED, momentum=0.3)
    mean, std = norm.running_mean.clone(), norm.running_std.clone()
    norm(x)
    assert_close(norm.running_mean, 0.7 * mean + 0.3 * x.mean((0, 2)))
    assert_close(norm.running_std, 0.7 * std + 0.3 * (x.var((0, 2), correction=0) + norm.eps).sqrt())
    assert norm.num_batches_tracked == 1


def test_the_schedule_opens_the_bounds_with_the_steps() -> None:
    schedule = RenormSchedule.over(100)
    assert (schedule.start, schedule.r_end, schedule.d_end) == (10, 80, 50)
    for step, r_max, d_max in ((0, 1, 0), (10, 1, 0), (30, 1 + 2 * 20 / 70, 2.5), (50, 1 + 2 * 40 / 70, 5), (99, 3, 5)):
        assert schedule(step) == pytest.approx((r_max, d_max))
        assert_close(schedule(torch.tensor(step)), tuple(map(torch.tensor, (float(r_max), float(d_max)))))
    x, norm = _x() + 20, _norm(RenormSchedule(start=1, r_end=2, d_end=2))
    like = nn.BatchNorm1d(3, affine=False).double()
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


def _x_batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 4, 5, 3)), dtype=torch.float64) * 2 + 3


def _random(module: nn.Module) -> nn.Module:
    random_(module, mean=1.0)
    return module.double()


def _estimating(channels: int) -> BatchChannelNorm:
    return BatchChannelNorm(channels, 2, estimate=True)


def _group(z: Tensor, norm: BatchChannelNorm) -> Tensor:
    weight, bias = (value.repeat_interleave(2).view(-1, 1, 1) for value in (norm.group_weight, norm.group_bias))
    return F.group_norm(z, 2) * weight + bias


def test_estimated_statistics_by_hand() -> None:
    norm = _random(EstBatchNorm(4, momentum=0.3))
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for _ in range(3):
        x = _x_batch()
        fresh = (x - mean.view(-1, 1, 1)).square().mean((0, 2, 3))
        mean, var = 0.7 * mean + 0.3 * x.mean((0, 2, 3)), 0.7 * var + 0.3 * fresh
        wanted = F.batch_norm(x, mean, var, norm.weight, norm.bias)
        assert_close(norm(x), wanted)
        assert_close(copy.deepcopy(norm).eval()(x), wanted)
    assert_close((norm.running_mean, norm.running_var), (mean, var))


def test_gradients_do_not_see_the_estimates_and_survive_another_forward() -> None:
    x, norm = _x_batch().requires_grad_(), _random(EstBatchNorm(4))
    y = norm(x)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    norm(_x_batch())  # moves the statistics in place
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient, scale.detach().view(-1, 1, 1).expand_as(x))


def test_micro_batches_of_one_image() -> None:
    x, norm = _x_batch(), _random(BatchChannelNorm(4, 2, estimate=True))
    like = EstBatchNorm(4).double()
    like.load_state_dict({k: v for k, v in norm.state_dict().items() if "group" not in k})
    for image in x.split(1):
        assert_close(norm(image), _group(like(image), norm))
    assert EstBatchNorm(4)(torch.randn(1, 4)).isfinite().all()


def test_functions_update_what_they_are_given() -> None:
    x, norm, est = _x_batch(), _random(BatchChannelNorm(4, 2)), _random(EstBatchNorm(4))
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    found = batch_channel_norm(x, 2, mean, var, norm.weight, norm.bias, norm.group_weight, norm.group_bias, True)
    assert_close(found, norm(x))
    assert_close((mean, var), (norm.running_mean, norm.running_var))
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    assert_close(est_batch_norm(x, mean, var, est.weight, est.bias, True), est(x))
    assert_close((mean, var), (est.running_mean, est.running_var))
    bare = BatchChannelNorm(4, 2, affine=False).double()
    assert not list(bare.parameters())
    bare(x)


@pytest.mark.parametrize("make", [EstBatchNorm, lambda c: BatchChannelNorm(c, 2), _estimating], ids=["e", "bc", "ab"])
def test_update_bn_gives_the_statistics_of_all_batches(make) -> None:
    norm, batches = make(4).double(), [_x_batch() + step for step in range(3)]
    norm.running_mean.fill_(7.0)
    torch.optim.swa_utils.update_bn(batches, norm)
    assert norm.momentum == 0.1
    whole = torch.cat(batches)
    assert_close(norm.running_mean, whole.mean((0, 2, 3)))
    if isinstance(norm, BatchChannelNorm) and not norm.estimate:  # as batch normalization
        assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    else:
        assert_close(norm.running_var, whole.var((0, 2, 3), correction=0))


RAW = {
    **{
        f"BatchGroupNorm {groups} {examples}": BatchGroupNorm(4, groups, examples, momentum=0.3)
        for groups, examples in ((None, None), (None, 4), (None, 1), (2, 2), (2, 1), (1, None))
    },
    **{f"GhostBatchNorm {size}": GhostBatchNorm(4, size, memory="moments", momentum=0.3) for size in (2, 5)},
}


@pytest.mark.parametrize("norm", RAW.values(), ids=RAW)
def test_memory_averages_raw_moments_of_each_channel(norm: nn.Module) -> None:
    x, norm = _x_batch(), copy.deepcopy(norm).double()
    first, second = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    for step in range(1, 4):
        norm(x * step)
        first = 0.7 * first + 0.3 * (x * step).mean((0, 2, 3))
        second = 0.7 * second + 0.3 * (x * step).square().mean((0, 2, 3))
    assert_close((norm.running_mean, norm.running_var), (first, second - first.square()))
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (6, 4)])
def test_equation_three(alpha: float, groups: int | None, shape: tuple[int, ...]) -> None:
    x, norm = _x_batch(*shape), BatchGroupNorm(4, groups, 2, alpha=alpha).double()
    random_(norm)
    norm(x)
    first, var = norm.state_dict()["running_mean"], norm.state_dict()["running_var"]
    second = var + first.square()
    y = torch.empty_like(x)
    for n in range(6):
        for c in range(4):
            group = [c] if groups is None else range(c // 2 * 2, c // 2 * 2 + 2)
            mean = sum(alpha * x[n, k].mean() + (1 - alpha) * first[k] for k in group) / len(group)
            square = sum(alpha * x[n, k].square().mean() + (1 - alpha) * second[k] for k in group) / len(group)
            deviation = (square - mean.square() + norm.eps).sqrt()
            y[n, c] = norm.weight[c] * (x[n, c] - mean) / deviation + norm.bias[c]
    norm.eval()
    assert_close((norm(x), norm(x[2:3])), (y, y[2:3]))


def test_evaluation_keeps_accuracy_beside_a_large_mean() -> None:
    x = torch.randn(8, 4, 64) + 1e4
    norm = BatchGroupNorm(4, alpha=0.5, momentum=1.0)
    norm(x)
    exact = example_weighing(x.double(), norm.running_mean.double(), norm.running_var.double(), alpha=0.5)
    # A mean of 1e4 is known to half a unit in its last place, 5e-4 deviations.
    assert_close(norm.eval()(x).double(), exact, rtol=0, atol=2e-3)


def _samples(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, dtype=torch.float64) * 2 + 3


def _trained(norm: GhostBatchNorm, x: Tensor, steps: int = 3) -> GhostBatchNorm:
    for step in range(steps):
        norm(x * (1 + step))
    return norm


@pytest.mark.parametrize(
    ("batch", "sizes"), [(6, [2] * 3), (7, [2, 2, 3]), (3, [3]), (2, [2]), (8, [2] * 4), (9, [2, 2, 2, 3])]
)
def test_a_last_sub_batch_of_one_value_joins_the_one_before(batch: int, sizes: list[int]) -> None:
    x = _samples(batch, 3)
    wanted = torch.cat([nn.BatchNorm1d(3).double()(part) for part in x.split(sizes)])
    assert_close(GhostBatchNorm(3, 2).double()(x), wanted)


def test_memory_of_the_mean() -> None:
    x = _samples(8, 3, 4)
    parts = torch.stack(x.split(2))
    norm = _trained(GhostBatchNorm(3, 2).double(), x, 1)
    assert_close(norm.running_mean, 0.1 * parts.mean((1, 3)).mean(0))
    assert_close(norm.running_var, 0.9 + 0.1 * parts.transpose(1, 2).flatten(2).var(2).mean(0))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("batch", [8, 7])
def test_memory_one_after_another_is_batch_norm_on_each(batch: int) -> None:
    x, like = _samples(batch, 3, 4), nn.BatchNorm1d(3).double()
    norm = _trained(GhostBatchNorm(3, 2, memory="sequential").double(), x)
    for step in range(3):
        for part in x.split(2):
            like(part * (1 + step))
    assert_close(norm.state_dict(), like.state_dict())


def test_memory_of_moments_keeps_the_variance_beside_a_large_mean() -> None:
    x = torch.randn(64, 3, 16) + 1e4
    norm = GhostBatchNorm(3, 8, memory="moments", momentum=0.1)
    with torch.no_grad():
        norm.running_mean.fill_(1e4)
    for _ in range(50):
        norm(x)
    # In float32 E[x^2] - E[x]^2 is a difference of numbers of 1e8, each known to 8: worthless for a variance of 1.
    assert_close(norm.running_var.double(), x.double().var((0, 2), correction=0), rtol=2e-2, atol=0)


def test_random_sub_batches_give_each_sample_its_own_place_back() -> None:
    x = _samples(8, 3, 4)
    norm = GhostBatchNorm(3, 4, permute=True).double()
    torch.manual_seed(1)
    found = norm(x)
    torch.manual_seed(1)
    order = torch.randperm(8)
    assert_close(found[order], GhostBatchNorm(3, 4).double()(x[order]))
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    mask[..., 3] = False
    assert (norm(x, mask=mask)[..., 3] == 0).all()


@pytest.mark.parametrize(("memory", "real"), [("mean", 0), ("mean", 1), ("moments", 0), ("sequential", 0)])
def test_a_sub_batch_of_padding_or_with_one_real_value_has_no_variance_to_remember(memory: Any, real: int) -> None:
    x, mask = _samples(4, 3, 5), torch.ones(4, 1, 5, dtype=torch.bool)
    mask[2:] = False
    mask[2, :, :real] = True
    norm, like = GhostBatchNorm(3, 2, memory=memory).double(), GhostBatchNorm(3, 2, memory=memory).double()
    norm(x, mask=mask)
    like(x[:2])
    assert_close((norm.running_mean, norm.running_var), (like.running_mean, like.running_var))


def test_the_function_updates_what_it_is_given() -> None:
    x, norm = _samples(7, 3, 5), GhostBatchNorm(3, 2).double()
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    assert_close(ghost_batch_norm(x, 2, running_mean=mean, running_var=var), norm(x))
    assert_close((mean, var), (norm.running_mean, norm.running_var))


def test_explain_tells_of_the_samples_left_over() -> None:
    norm = GhostBatchNorm(3, 16)
    text = str(norm.explain(torch.randn(20, 3)))
    assert "one statistic for each of 1 sub-batches x 3 channels = 3, over 16 samples" in text
    assert "the last 4 samples form another sub-batch" in text
    assert "apart" not in norm.explain(torch.randn(32, 3)).why
    assert "over 17 samples" in norm.explain(torch.randn(17, 3)).support
