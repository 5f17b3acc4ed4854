"""The normalized transformer's parts: lengths of 1, steps of a learned rate, scales in other units, weights put back."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.hypersphere import (
    HypersphereResidual,
    LearnedScale,
    hypersphere,
    hypersphere_residual,
    renormalize_,
)
from normkit.core.errors import OptionError, ShapeError


def test_states_stay_on_the_sphere_and_move_toward_the_branch() -> None:
    residual = HypersphereResidual(16).double()
    h, branch = hypersphere(torch.randn(5, 16).double()), torch.randn(5, 16).double() * 7
    after = residual(h, branch)
    assert_close(after.norm(dim=-1), torch.ones(5).double(), rtol=1e-12, atol=1e-12)
    target = hypersphere(branch)
    assert ((after * target).sum(-1) > (h * target).sum(-1)).all()
    assert_close(residual.rate.scale, torch.full((16,), 0.05).double(), rtol=1e-6, atol=0)
    # A small step is the rate times the difference, less what leads away from the sphere.
    small = hypersphere_residual(h, branch, 1e-6)
    step = target - h
    tangent = step - (step * h).sum(-1, keepdim=True) * h
    assert_close((small - h) / 1e-6, tangent, rtol=1e-4, atol=1e-4)


def test_extreme_rates() -> None:
    h, branch = hypersphere(torch.randn(5, 16).double()), torch.randn(5, 16).double()
    assert_close(hypersphere_residual(h, branch, 0.0), h, rtol=1e-12, atol=1e-12)
    assert_close(hypersphere_residual(h, branch, 1.0), hypersphere(branch), rtol=1e-12, atol=1e-12)
    assert_close(hypersphere_residual(h, torch.zeros_like(h), 0.05), h, rtol=1e-12, atol=1e-12)


def test_a_scale_moves_by_its_start_over_its_unit() -> None:
    plain, scaled = LearnedScale(4, start=0.05), LearnedScale(4, start=0.05, unit=1 / math.sqrt(256))
    for layer in (plain, scaled):
        assert_close(layer.scale, torch.full((4,), 0.05))
        with torch.no_grad():
            layer.weight.add_(0.01)
    assert_close(scaled.scale - 0.05, 16 * (plain.scale - 0.05))
    assert scaled(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(OptionError, match="unit=0"):
        LearnedScale(4, unit=0.0)


def test_weights_go_back_to_the_sphere_after_a_step() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(11, 8), "up": nn.Linear(8, 20), "down": nn.Linear(20, 8)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model["down"](model["up"](model["words"](torch.arange(11)))).square().sum().backward()
    optimizer.step()
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    renormalize_(reads=[model["words"], model["up"]], writes=[model["down"]])
    for name, dim in (("words", 1), ("up", 1), ("down", 0)):
        weight = model[name].weight
        assert weight.requires_grad
        assert_close(weight, before[name] / before[name].norm(dim=dim, keepdim=True))
    with pytest.raises(ShapeError, match="LayerNorm has a weight of shape 8"):
        renormalize_(reads=[nn.LayerNorm(8)])
    with pytest.raises(ShapeError, match="shape none"):
        renormalize_(writes=[nn.ReLU()])
