"""Networks without activation norms: scaled weights, predicted variances, adaptive clipping."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit import NormalizerFreeBlock
from normkit.activations.dynamic_tanh import predicted_betas
from normkit.core.errors import OptionError
from normkit.functional import adaptive_gradient_clipping, scaled_activation
from normkit.gradients import AdaptiveClipping, GradientNormalizer
from normkit.weights import nonlinearity_gain, scaled_weight_standardization, weight_conditioning, weight_norm
from normkit.weights.weight_standardization import RELU_GAIN

LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed, groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}


def test_gains_of_nonlinearities() -> None:
    assert math.sqrt(2 / (1 - 1 / math.pi)) == RELU_GAIN
    assert nonlinearity_gain(torch.relu) == pytest.approx(RELU_GAIN, abs=1e-8)
    assert nonlinearity_gain(lambda z: z) == pytest.approx(1, abs=1e-9)
    z = torch.randn(2_000_000, dtype=torch.float64)
    for activation in (torch.tanh, nn.functional.gelu, nn.functional.silu):
        # The deviation of two million samples is known to about 1e-3.
        assert (activation(z) * nonlinearity_gain(activation)).std().item() == pytest.approx(1, abs=3e-3)
    with pytest.raises(OptionError, match="constant"):
        nonlinearity_gain(torch.zeros_like)


def test_the_signal_has_the_predicted_variance() -> None:
    width, transitions = 512, [True, False, False, False, True, False, False]
    betas = predicted_betas(transitions)

    def layer() -> nn.Module:
        return scaled_weight_standardization(nn.Linear(width, width, bias=False), gamma=1.0)

    def branch() -> nn.Module:
        return nn.Sequential(scaled_activation(nn.ReLU(), RELU_GAIN), layer())

    x, found = torch.randn(256, width), []
    for beta, transition in zip(betas, transitions, strict=True):
        found.append(x.std().item())
        x = NormalizerFreeBlock(branch(), beta, shortcut=layer() if transition else None)(x).detach()
    # Shortcut and branch of a random network of width 512 are correlated by about 512 ** -0.5.
    assert found == pytest.approx(betas, rel=0.05)


def test_block_and_betas() -> None:
    block = NormalizerFreeBlock(nn.Tanh(), beta=2.0, alpha=0.5, shortcut=nn.ReLU())
    x = torch.randn(4)
    assert_close(block(x), torch.relu(x / 2) + 0.5 * torch.tanh(x / 2))
    assert [beta**2 for beta in predicted_betas([True, False, True], 0.5)] == pytest.approx([1.0, 1.25, 1.5])
    with pytest.raises(OptionError, match="beta=0"):
        NormalizerFreeBlock(nn.Tanh(), beta=0)


def _gradients(model: nn.Module, size: float = 100.0) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * size
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_units_are_clipped_to_a_share_of_their_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.Linear(3, 2)).double()
    before = _gradients(model)
    nn.init.zeros_(model[0].weight[0])
    clipped = adaptive_gradient_clipping(model, 0.01)
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        if name.startswith("3"):
            assert_close(parameter.grad, old, rtol=0, atol=0)
            continue
        weights, units, olds = parameter.detach(), parameter.grad, old
        if parameter.dim() == 1:
            weights, units, olds = weights[None], units[None], olds[None]
        elif name.startswith("2"):
            weights, units, olds = (value.transpose(0, 1) for value in (weights, units, olds))
        for weight, unit, was in zip(weights, units, olds, strict=True):
            assert_close(unit, was * (0.01 * max(weight.norm().item(), 1e-3) / was.norm()))
    assert clipped == 4 + 1 + 1 + 1 + 2 + 1


def test_small_gradients_stay_and_broken_ones_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = _gradients(model, 1e-7)
    assert AdaptiveClipping(model)() == 0
    assert_close([parameter.grad for parameter in model.parameters()], before, rtol=0, atol=0)
    model[0].weight.grad[1, 0] = torch.inf
    model[0].weight.grad[2] = 1e30
    AdaptiveClipping(model, skip=lambda name, module: False)()
    assert model[0].weight.grad[1, 0] == torch.inf
    assert_close(model[0].weight.grad[2].norm(), 0.01 * model[0].weight[2].norm())
    with pytest.raises(OptionError, match="clip=0"):
        AdaptiveClipping(model, 0)


WEIGHTS = {
    "plain": lambda layer: layer,
    "weight norm": weight_norm,
    "weight norm, torch's": nn.utils.parametrizations.weight_norm,
    "scaled standardization": scaled_weight_standardization,
    "row": weight_conditioning,
}


@pytest.mark.parametrize("put", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("name", LAYERS)
def test_raw_weights_are_clipped_and_centralized_by_their_layers_units(name: str, put) -> None:
    model = nn.Sequential(put(LAYERS[name]().double()), put(nn.Linear(3, 2).double()))
    layer = model[0]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 100
    weight = layer.get_submodule("parametrizations.weight") if put is not WEIGHTS["plain"] else layer
    raw = max(weight.parameters(recurse=False), key=lambda parameter: parameter.numel())
    before = {parameter: parameter.grad.clone() for parameter in model.parameters()}
    centralized = GradientNormalizer(model, None, centralize=True)
    assert len(centralized.groups) == len(before)
    centralized.apply()
    assert_close(by_units(layer, raw.grad).mean(1), torch.zeros(layer.bias.numel()).double(), rtol=0, atol=1e-12)
    for parameter in before.keys() - {raw, *(p for p in model[1].parameters() if p.numel() == 6)}:
        assert_close(parameter.grad, before[parameter], rtol=0, atol=0)  # a length less its mean would be nothing
    adaptive_gradient_clipping(model, clip=0.5)
    assert_close(by_units(layer, raw.grad).norm(dim=1), 0.5 * by_units(layer, raw.detach()).norm(dim=1))
    for parameter in layer.parameters():
        assert parameter.grad.norm() <= 0.5 * parameter.norm().clamp_min(1e-3) * (1 + 1e-12)
    for parameter in model[1].parameters():  # the head
        assert parameter.grad.norm() > 10


def by_units(layer: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def test_a_layers_gradients_have_one_length_parametrized_or_not() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(5, 4)), weight_conditioning(nn.Linear(4, 2)))
    assert [len(group) for group in GradientNormalizer(model, "layer").groups] == [3, 2]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(3, 5)).sum().backward()
    GradientNormalizer(optimizer, None, centralize=True).apply()  # which does not know what is a length
    assert model[0].get_parameter("parametrizations.weight.original0").grad.abs().max() > 0
