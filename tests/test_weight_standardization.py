"""Weight standardization, by its definition and in its published forms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.weights.layout import WeightLayout
from normkit.weights.weight_standardization import PUBLISHED, WeightStandardization, standardize, weight_standardization


def test_the_published_forms() -> None:
    w = torch.randn(4, 3, 2, 2).double()
    rest = w - w.mean((1, 2, 3), keepdim=True)
    var = rest.square().mean((1, 2, 3), keepdim=True)
    unbiased = var * 12 / 11
    wanted = {
        "paper": rest / (var + 1e-5).sqrt(),
        "authors": rest / (unbiased.sqrt() + 1e-5),
        "batch_channel": rest / (unbiased + 1e-5).sqrt(),
        "timm": rest / (var + 1e-6).sqrt(),
    }
    assert wanted.keys() == PUBLISHED.keys()
    for name, options in PUBLISHED.items():
        assert_close(standardize(w, **options), wanted[name], rtol=1e-12, atol=1e-12)
        layer = weight_standardization(nn.Conv2d(3, 4, 2).double(), **options)
        layer.weight = w
        assert_close(layer.weight.detach(), wanted[name], rtol=1e-12, atol=1e-12)
        assert f"{name}``" in (WeightStandardization.__doc__ or "")
    assert_close(standardize(w), wanted["paper"])
    timm = F.batch_norm(w.reshape(1, 4, -1), None, None, training=True, momentum=0.0, eps=1e-6).view_as(w)
    assert_close(wanted["timm"], timm)


@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 3))
def test_each_output_unit_has_mean_zero_and_variance_one(out, into, taps) -> None:
    w = standardize(torch.randn(out, into, taps).double() * 3 + 5, eps=0.0).flatten(1)
    assert_close(w.mean(1), torch.zeros(out).double(), rtol=0, atol=1e-9)
    assert_close(w.square().mean(1), torch.ones(out).double())


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(5, 4)]
)
def test_output_units_of_every_layer(layer) -> None:
    weight_standardization(layer, eps=0.0)
    if isinstance(layer, nn.ConvTranspose2d):
        units = layer.weight.detach().view(2, 2, 3, 9).transpose(1, 2).reshape(6, 18)
    else:
        units = layer.weight.detach().flatten(1)
    assert_close(units.mean(1), torch.zeros(len(units)), rtol=0, atol=1e-5)
    assert_close(units.var(1, correction=0), torch.ones(len(units)))


def test_the_gradient_is_orthogonal_to_shift_and_scale() -> None:
    w = torch.randn(4, 6).double().requires_grad_()
    y = standardize(w, eps=0.0)
    (d,) = torch.autograd.grad((y * torch.randn(4, 6).double()).sum(), [w])
    zero = torch.zeros(4).double()
    assert_close(d.sum(1), zero, rtol=0, atol=1e-12)
    assert_close((d * y).sum(1), zero, rtol=0, atol=1e-12)


def test_scale_and_shift_of_a_row_change_nothing() -> None:
    w, scale = torch.randn(4, 6).double(), torch.tensor([[2.0], [0.5], [10.0], [1.0]]).double()
    assert_close(standardize(w * scale + 3, eps=0.0), standardize(w, eps=0.0))


def test_a_constant_row_becomes_zero() -> None:
    assert_close(standardize(torch.full((1, 4), 7.0)), torch.zeros(1, 4))


def test_a_large_mean_costs_no_accuracy() -> None:
    w = torch.randn(4, 64)
    # 1e4 + w itself is rounded to 2^-10.
    assert_close(standardize(w + 1e4), standardize((w + 1e4).double()).float(), rtol=1e-4, atol=1e-4)


def test_one_weight_for_each_unit_is_refused() -> None:
    with pytest.raises(OptionError, match="one element for each output unit"):
        weight_standardization(nn.Conv2d(3, 3, 1, groups=3))
    with pytest.raises(OptionError, match="correction=2"):
        weight_standardization(nn.Linear(3, 2), correction=2)
    assert standardize(torch.randn(2, 6, 1), layout=WeightLayout(output_axis=1)).shape == (2, 6, 1)
