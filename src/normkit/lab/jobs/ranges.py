"""What batch statistics can make of values, and what running statistics make of them."""

import copy
import math
from functools import partial

import torch
from torch import Tensor, nn

from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.activations.batch_norm import BatchNorm
from normkit.activations.batch_renorm import BatchRenorm, RenormSchedule
from normkit.lab.models.small_cnn import SmallCNN

STRONG = 10.0  # what one image of a batch is multiplied by
OUTLIERS = [2.0 ** (power / 2) for power in range(-4, 15)]
RESPONSES = 8  # values per channel in the table of what one value becomes


@torch.no_grad()
def ranges(model: SmallCNN, x: Tensor, batch: int) -> list[dict[str, float]]:
    """For each batch normalization the bound sqrt(n - 1) and the largest normalized values met, before weight and bias.

    ``train`` is normalized by each batch's own statistics and ``eval`` by the running ones; ``train strong`` and ``eval strong``
    likewise, where the first image of each batch is made ten times as strong.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    found: list[dict[str, float]] = [{} for _ in layers]
    x = x[: len(x) // batch * batch]
    strong = x.clone()
    strong[::batch] *= STRONG

    def see(place: int, key: str, layer: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)
        normal = normalized(values) if layer.training else against(values, layer)
        found[place]["bound"] = math.sqrt(batch * inputs[0][0, 0].numel() - 1)
        found[place][key] = max(found[place].get(key, 0.0), normal.abs().max().item())

    for mode in ("train", "eval"):
        for suffix, images in (("", x), (" strong", strong)):
            hooks = [
                layer.register_forward_pre_hook(partial(see, place, mode + suffix))
                for place, layer in enumerate(layers)
            ]
            model.train(mode == "train")
            for part in images.split(batch):
                model(part)
            for hook in hooks:
                hook.remove()
    return found


def normalized(values: Tensor) -> Tensor:
    """Values (channels, n) minus their mean, over their deviation: none exceeds sqrt(n - 1), which one value alone attains."""
    centred = values - values.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).add(1e-30).sqrt()


def against(values: Tensor, layer: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Values (channels, n) normalized by a layer's running statistics."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return (values - layer.running_mean[:, None]) / (layer.running_var[:, None] + layer.eps).sqrt()


def responses() -> dict[str, list[float]]:
    """What one value out of eight becomes as it grows, the other seven standard normal in sum, by each kind of statistics.

    Running statistics are those of standard normal values.
    """
    others = normalized(torch.randn(1, RESPONSES - 1, generator=torch.Generator().manual_seed(0)))
    layers: dict[str, nn.Module] = {
        "batch": BatchNorm(1),
        "running": BatchNorm(1).eval(),
        "weighed": BatchGroupNorm(1, alpha=0.1).eval(),
        "renorm": BatchRenorm(1, schedule=RenormSchedule.constant(r_max=3, d_max=5)),
    }
    found: dict[str, list[float]] = {"input": OUTLIERS, **{name: [] for name in layers}}
    for value in OUTLIERS:
        column = torch.cat([torch.tensor([[value]]), others], dim=1).T
        for name, layer in layers.items():
            fresh = copy.deepcopy(layer)  # a training step moves running statistics
            found[name].append(fresh(column)[0].item())
    return found
