"""Weight standardization, by its definition and in its published forms."""

import pytest
import torch
import torch.nn.functional as F
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


def test_a_constant_row_becomes_zero() -> None:
    assert_close(standardize(torch.full((1, 4), 7.0)), torch.zeros(1, 4))


def test_one_weight_for_each_unit_is_refused() -> None:
    with pytest.raises(OptionError, match="one element for each output unit"):
        weight_standardization(nn.Conv2d(3, 3, 1, groups=3))
    with pytest.raises(OptionError, match="correction=2"):
        weight_standardization(nn.Linear(3, 2), correction=2)
    assert standardize(torch.randn(2, 6, 1), layout=WeightLayout(output_axis=1)).shape == (2, 6, 1)
