"""Neural radiance fields: what colour and density a scene has at a point, seen from a direction."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.surgery.recipe import Recipe, apply_recipe

Norm = Callable[[int], nn.Module]
BANDS = 10, 4  # frequencies of points and of directions


class PositionalEncoding(nn.Module):
    """Coordinates and their sines and cosines at doubling frequencies.

        x -> (x, sin x, cos x, sin 2x, cos 2x, ..., sin 2^(L-1) x, cos 2^(L-1) x),   L = bands; 0 gives x alone

    Shape: ``(*, inputs)`` to ``(*, inputs (1 + 2 bands))``.

    Reference:
        Mildenhall et al. 2020, NeRF, https://arxiv.org/abs/2003.08934; the input itself and frequencies without pi as in
        its published code, https://github.com/bmild/nerf
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
    """A multilayer perceptron from a point and a direction to colour and density, as in NeRF.

    The point's encoding goes through the trunk and comes in again after layer `skip`, counted from 0 (one past the trunk's end
    leaves it out); density is read from the trunk, colour from its features joined with the direction's encoding. `norm`
    builds what stands between each trunk layer and its ReLU.

    Shape: points ``(n, 3)`` and unit directions ``(n, 3)`` to colours ``(n, 3)`` from 0 to 1 and raw densities ``(n,)``, of
    which the positive part counts.
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
    """Makes a NeRF and gives its trunks the normalizations of a recipe.

    ``"none"`` is the published network, ``"none+e@re:trunk"`` its E form, ``"none+wn@re:trunk"`` has weight normalization;
    ``"bn"`` and ``"ln"`` normalize between each trunk layer and its ReLU.

    Reference: Saratchandran, Wang, Lucey 2024, Weight conditioning, https://arxiv.org/abs/2409.03424
    """
    norm = Recipe.parse(recipe).norm
    bare = norm is None or norm.name == "none"
    model = NeRF(width, depth, skip, norm=None if bare else nn.BatchNorm1d)
    apply_recipe(model, recipe)
    return model
