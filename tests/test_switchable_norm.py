"""Switchable normalization: each single normalizer at one corner, running averages, masks, the authors' correction."""

import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.switchable_norm import SwitchableNorm, switchable_norm


def _image() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + 1


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
