"""Occupancy fields: small networks that say whether a point lies inside a shape."""

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from normkit.core.errors import OptionError
from normkit.lab.models.nerf import PositionalEncoding
from normkit.surgery.recipe import apply_recipe

Kind = Literal["gaussian", "sine", "relu"]
BANDS = 8  # of the positional encoding


class Gaussian(nn.Module):
    """A bump, exp(-u^2 / (2 s^2)), s = spread; Ramasinghe and Lucey 2022, https://arxiv.org/abs/2111.15135."""

    def __init__(self, spread: float = 0.09) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, u: Tensor) -> Tensor:
        return torch.exp(u.square() * (-0.5 / self.spread**2))


class Sine(nn.Module):
    """A wave, sin(w u), w = frequency; Sitzmann et al. 2020, SIREN, https://arxiv.org/abs/2006.09661.

    >>> Sine(math.pi)(torch.tensor([0.0, 0.5]))
    tensor([0., 1.])
    """

    def __init__(self, frequency: float = 30.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, u: Tensor) -> Tensor:
        return torch.sin(self.frequency * u)


class OccupancyField(nn.Module):
    """A multilayer perceptron from a point ``(n, 3)`` to the logit ``(n,)`` of its being inside.

    Its activation is ``"gaussian"``, ``"sine"``, or ``"relu"`` behind a positional encoding; `depth` layers precede the last.
    """

    def __init__(self, kind: Kind = "gaussian", width: int = 256, depth: int = 4) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise OptionError(f"OccupancyField: kind={kind!r}; wanted one of {', '.join(map(repr, get_args(Kind)))}")
        self.encoding = PositionalEncoding(BANDS if kind == "relu" else 0)
        sizes = [self.encoding.features, *[width] * depth]
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.last = nn.Linear(width, 1)
        self.activation = {"gaussian": Gaussian, "sine": Sine, "relu": nn.ReLU}[kind]()
        if kind == "sine":
            self._start_waves(self.activation.frequency)

    def forward(self, points: Tensor) -> Tensor:
        h = self.encoding(points)
        for layer in self.trunk:
            h = self.activation(layer(h))
        return self.last(h).squeeze(-1)

    @torch.no_grad()
    def _start_waves(self, frequency: float) -> None:
        # SIREN's: the first layer spans the frequencies, every other keeps its input's distribution.
        for number, layer in enumerate([*self.trunk, self.last]):
            assert isinstance(layer, nn.Linear)
            fan = layer.in_features
            bound = 1 / fan if number == 0 else math.sqrt(6 / fan) / frequency
            layer.weight.uniform_(-bound, bound)


def occupancy(recipe: str = "none", kind: Kind = "gaussian", *, width: int = 256, depth: int = 4) -> OccupancyField:
    """Makes an occupancy field and gives its layers the weight methods of a recipe, such as ``"none+e@re:trunk"``."""
    model = OccupancyField(kind, width, depth)
    apply_recipe(model, recipe)
    return model
