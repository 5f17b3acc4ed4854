"""Fields over space: what colour and density a scene has at a point, and whether a point lies inside a shape."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.core.errors import OptionError
from normkit.surgery.recipe import Recipe, apply_recipe

Norm = Callable[[int], nn.Module]
BANDS = 10, 4  # frequencies of points and of directions
OCCUPANCY_BANDS = 8  # of the positional encoding


class PositionalEncoding(nn.Module):
    """Coordinates and their sines and cosines at doubling frequencies.

        x -> (x, sin x, cos x, sin 2x, cos 2x, ..., sin 2^(L-1) x, cos 2^(L-1) x),   L = bands; 0 gives x alone

    As in NeRF's published code, https://github.com/bmild/nerf: the input itself, and frequencies without pi.
    """

    frequencies: Tensor

    def __init__(self, bands: int, inputs: int = 3) -> None:
        super().__init__()
        self.features = inputs * (1 + 2 * bands)
        self.register_buffer("frequencies", 2.0 ** torch.arange(bands), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = x[..., None, :] * self.frequencies[:, None]
        waves = torch.stack([angles.sin(), angles.cos()], dim=-2)
        return torch.cat([x, waves.flatten(-3)], dim=-1)


class RadianceField(nn.Module):
    """A multilayer perceptron from points and unit directions ``(n, 3)`` to colours ``(n, 3)`` and raw densities ``(n,)``.

    The point's encoding goes through the trunk and comes in again after layer `skip`, counted from 0 (one past the trunk's end
    leaves it out); density is read from the trunk, colour from its features joined with the direction's encoding. `norm`
    builds what stands between each trunk layer and its ReLU.
    """

    def __init__(self, width: int = 256, depth: int = 8, skip: int = 4, norm: Norm | None = None) -> None:
        super().__init__()
        self.skip = skip
        self.place, self.look = (PositionalEncoding(bands) for bands in BANDS)
        joined = {0: self.place.features, skip + 1: width + self.place.features}
        self.trunk = nn.ModuleList(nn.Linear(joined.get(layer, width), width) for layer in range(depth))
        self.norms = nn.ModuleList(norm(width) if norm else nn.Identity() for _ in range(depth))
        last = joined.get(depth, width)  # the skip may come after the last layer
        self.density = nn.Linear(last, 1)
        self.features = nn.Linear(last, width)
        self.view = nn.Linear(width + self.look.features, width // 2)
        self.colour = nn.Linear(width // 2, 3)

    def forward(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        place = self.place(points)
        h = place
        for number, (layer, norm) in enumerate(zip(self.trunk, self.norms, strict=True)):
            h = functional.relu(norm(layer(h)))
            if number == self.skip:
                h = torch.cat([place, h], dim=-1)
        view = functional.relu(self.view(torch.cat([self.features(h), self.look(directions)], dim=-1)))
        return self.colour(view).sigmoid(), self.density(h).squeeze(-1)


class NeRF(nn.Module):
    """Two radiance fields: a coarse one that finds where matter is, and a fine one that is sampled there."""

    def __init__(self, width: int = 256, depth: int = 8, skip: int = 4, norm: Norm | None = None) -> None:
        super().__init__()
        self.coarse, self.fine = (RadianceField(width, depth, skip, norm) for _ in range(2))


def nerf(recipe: str = "none", *, width: int = 256, depth: int = 8, skip: int = 4) -> NeRF:
    """Makes a NeRF whose trunks have the normalizations of a recipe; ``"bn"`` and ``"ln"`` stand between a layer and its ReLU."""
    norm = Recipe.parse(recipe).norm
    bare = norm is None or norm.name == "none"
    model = NeRF(width, depth, skip, norm=None if bare else nn.BatchNorm1d)
    apply_recipe(model, recipe)
    return model


Kind = Literal["gaussian", "sine", "relu"]


class Gaussian(nn.Module):
    """A bump, exp(-u^2 / (2 s^2)), s = spread; Ramasinghe and Lucey 2022, https://arxiv.org/abs/2111.15135."""

    def __init__(self, spread: float = 0.09) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, u: Tensor) -> Tensor:
        return torch.exp(u.square() * (-0.5 / self.spread**2))


class Sine(nn.Module):
    """A wave, sin(w u), w = frequency; Sitzmann et al. 2020, SIREN, https://arxiv.org/abs/2006.09661."""

    def __init__(self, frequency: float = 30.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, u: Tensor) -> Tensor:
        return torch.sin(self.frequency * u)


class OccupancyField(nn.Module):
    """A multilayer perceptron from points ``(n, 3)`` to logits ``(n,)`` of being inside; ReLU has an encoding before it."""

    def __init__(self, kind: Kind = "gaussian", width: int = 256, depth: int = 4) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise OptionError(f"OccupancyField: kind={kind!r}; wanted one of {', '.join(map(repr, get_args(Kind)))}")
        self.encoding = PositionalEncoding(OCCUPANCY_BANDS if kind == "relu" else 0)
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
