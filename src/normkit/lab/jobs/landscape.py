"""Covariate shift: how gradients turn and moments move with a step."""

import copy
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.train.images import Images


def groups(model: SmallCNN) -> list[list[nn.Parameter]]:
    """The parameters of each layer, a convolution with its norm, first layer first."""
    blocks = [model.features[k : k + 3] for k in range(0, len(model.features), 3)]
    return [list(block.parameters()) for block in [*blocks, model.classifier]]


def gradients(model: SmallCNN, batch: Images, seed: int) -> tuple[float, list[Tensor]]:
    """Loss and gradients of all parameters on a batch, with noise drawn by a seed; nothing is changed but running averages."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss = F.cross_entropy(model(batch[0]), batch[1])
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def turns(model: SmallCNN, batch: Images, rate: float) -> dict[str, float]:
    """How the gradient of a layer's weight changes when the layers before it take a step: cosine and relative length."""
    old, new = copy.deepcopy(model), copy.deepcopy(model)
    _, first = gradients(old, batch, 0)
    places = {id(parameter): place for place, parameter in enumerate(old.parameters())}
    layers, changed = groups(old), groups(new)
    cosines, lengths = [], []
    with torch.no_grad():
        for parameter, gradient in zip(new.parameters(), first, strict=True):
            parameter -= rate * gradient
    for k in range(1, len(layers)):
        mixed = copy.deepcopy(old)
        with torch.no_grad():
            for target, source in zip(groups(mixed)[:k], changed[:k], strict=True):
                for parameter, value in zip(target, source, strict=True):
                    parameter.copy_(value)
        place = places[id(max(layers[k], key=Tensor.dim))]  # the weight, which a parametrization puts behind the bias
        one, other = first[place].flatten(), gradients(mixed, batch, 1)[1][place].flatten()
        cosines.append(F.cosine_similarity(one, other, dim=0).item())
        lengths.append(((one - other).norm() / one.norm().clamp_min(1e-30)).item())
    return {"turn": fmean(cosines), "change": fmean(lengths)}


@torch.no_grad()
def moments(model: SmallCNN, probe: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Means and deviations of the channels that enter each layer but the first, on images that stay the same."""
    twin, found = copy.deepcopy(model), []
    x = probe
    for place, module in enumerate(twin.features):
        x = module(x)
        if place % 3 == 2:
            found.append((x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3))))
    return found


def moved(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """How far means and deviations of layers' inputs have moved, in parts of the deviation; means over layers and channels."""

    def part(which: int) -> float:
        pairs = zip(before, after, strict=True)
        return fmean(((b[which] - a[which]).abs() / a[1].clamp_min(1e-12)).mean().item() for a, b in pairs)

    return {"mean": part(0), "deviation": part(1)}
