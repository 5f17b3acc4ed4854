"""What normalizations of one sample, and mixtures with those of a batch, equal."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit import BatchNorm, ExemplarNorm, PositionalNorm, SwitchableNorm
from normkit.activations.layer_norm import moment_shortcut
from normkit.functional import instance_norm, layer_norm, positional_moments, positional_norm, switchable_norm

# Exemplar normalization


def _image() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + torch.arange(3.0).view(3, 1, 1, 1)


def test_starts_as_the_mean_of_the_three() -> None:
    x, norm = _image(), ExemplarNorm(4).double()
    batch = BatchNorm(4).double()
    three = (instance_norm(x), layer_norm(x, 4, over="c *"), batch(x))
    assert_close(norm(x), sum(three) / 3)
    assert_close((norm.running_mean, norm.running_var), (batch.running_mean, batch.running_var))
    assert_close(norm.eval()(x), (three[0] + three[1] + batch.eval()(x)) / 3)


# Switchable normalization


def _corner(k: int, **options: object) -> SwitchableNorm:
    norm = SwitchableNorm(4, **options).double()
    for logits in (norm.mean_weight, norm.var_weight):
        nn.init.constant_(logits, -1000.0)
        with torch.no_grad():
            logits[k] = 1000.0
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def test_a_single_logit_is_batch_norm_with_its_running_averages() -> None:
    norm, batch_norm = _corner(2), BatchNorm(4).double()
    with torch.no_grad():
        batch_norm.weight.copy_(norm.weight)
        batch_norm.bias.copy_(norm.bias)
    x = _image()
    for _ in range(3):
        x = x + 1
        assert_close(norm(x), batch_norm(x))
    assert_close(norm.running_mean, batch_norm.running_mean)
    assert_close(norm.running_var, batch_norm.running_var)
    assert_close(norm.eval()(x), batch_norm.eval()(x))
    norm.reset_parameters()
    assert (norm.running_mean == 0).all()
    assert (norm.running_var == 1).all()


def test_the_authors_moments_come_from_unbiased_instance_variances() -> None:
    x, logits = _image(), torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    flat = x.view(3, 4, -1)
    mean_in, var_in = flat.mean(-1, keepdim=True), flat.var(-1, keepdim=True)
    moment = var_in + mean_in**2
    mean_ln, mean_bn = mean_in.mean(1, keepdim=True), mean_in.mean(0, keepdim=True)
    var_ln, var_bn = moment.mean(1, keepdim=True) - mean_ln**2, moment.mean(0, keepdim=True) - mean_bn**2
    a, b, c = logits.softmax(0)
    mean, var = a * mean_in + b * mean_ln + c * mean_bn, a * var_in + b * var_ln + c * var_bn
    wanted = ((flat - mean) / (var + 1e-5).sqrt()).view_as(x)
    assert_close(switchable_norm(x, logits, logits, correction=1), wanted)


def test_padding_that_differs_between_samples_is_weighed_by_elements() -> None:
    x, norm = torch.randn(2, 4, 6, dtype=torch.float64), _corner(2)
    mask = torch.ones(2, 1, 6, dtype=torch.bool)
    mask[1, :, 2:] = False
    real = torch.cat([x[0], x[1, :, :2]], -1)
    wanted = (x[0] - real.mean(1, keepdim=True)) / (real.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert_close(norm(x, mask=mask)[0], norm.weight[:, None] * wanted + norm.bias[:, None])


def test_a_sample_with_a_single_real_position_does_not_spoil_the_others() -> None:
    norm, x = SwitchableNorm(4, correction=1).double(), _image().flatten(2).requires_grad_()
    mask = torch.ones(3, 1, 30, dtype=torch.bool)
    mask[0, :, 1:] = False
    y = norm(x, mask)
    assert y.isfinite().all()
    assert norm.running_var.isfinite().all()
    gradients = torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


# Filter response normalization


def test_a_learned_eps_counts_by_its_absolute_value() -> None:
    x, learned = torch.randn(2, 3, 4, 5, dtype=torch.float64), nk.FilterResponseNorm(3, 1e-4, learned_eps=True).double()
    nn.init.constant_(learned.eps_weight, -1e-4)
    assert_close(learned(x), nk.FilterResponseNorm(3, 1e-4).double()(x), rtol=1e-9, atol=0)


# Positional normalization


@pytest.mark.parametrize("correction", [0, 1])
def test_the_shortcut_restores_the_moments(correction: int) -> None:
    x, norm = _image(), PositionalNorm(correction=correction)
    moments = norm.moments(x)
    assert moments.mean.shape == moments.deviation.shape == (3, 1, 5, 6)
    assert_close(moment_shortcut(norm(x), moments), x, rtol=1e-9, atol=1e-9)
    later = moment_shortcut(norm(torch.randn_like(x)), moments)
    assert_close(later.mean(1, keepdim=True), moments.mean)
    # But for eps = 1e-5 beside variances that are seldom below 0.1.
    assert_close(later.std(1, keepdim=True, correction=correction), moments.deviation, rtol=1e-2, atol=0)


def test_gradients_flow_through_the_moments() -> None:
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)

    def output(x: torch.Tensor) -> torch.Tensor:
        return moment_shortcut(positional_norm(x).square(), positional_moments(x))

    assert torch.autograd.gradcheck(output, x)
    assert torch.autograd.gradgradcheck(output, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_types_are_float32(dtype: torch.dtype) -> None:
    x = _image().to(dtype)
    moments = positional_moments(x)
    assert moments.mean.dtype == moments.deviation.dtype == torch.float32
    assert moment_shortcut(positional_norm(x), moments).dtype == dtype
