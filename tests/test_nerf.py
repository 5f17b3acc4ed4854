"""Neural fields: sizes, and that the E form is the plain network with equilibrated weights."""

import copy

import pytest
import torch
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.lab.models.nerf import NeRF, PositionalEncoding, RadianceField, nerf
from normkit.lab.models.occupancy import OccupancyField, occupancy


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def equilibrated(model: torch.nn.Module) -> torch.nn.Module:
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if "trunk" in name and name.endswith("weight"):
                parameter /= parameter.norm(dim=1, keepdim=True)
    return by_hand


def seeded_nerf(recipe: str) -> NeRF:
    torch.manual_seed(0)
    return nerf(recipe, width=16)


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (NeRF(), 2 * 595_844),
        (nerf("none+e@re:trunk"), 2 * 595_844),
        (nerf("none+wn@re:trunk"), 2 * (595_844 + 8 * 256)),
        (nerf("bn"), 2 * (595_844 + 8 * 2 * 256)),
        (nerf("ln"), 2 * (595_844 + 8 * 2 * 256)),
        (RadianceField(width=64, depth=4, skip=2), 64 * 64 + 64 * 65 * 2 + 64 * 128 + 65 + 64 * 65 + 92 * 32 + 33 * 3),
        (OccupancyField(), 198_657),
        (OccupancyField("sine"), 198_657),
        (OccupancyField("relu"), 210_945),
    ],
)
def test_parameters(model: torch.nn.Module, wanted: int) -> None:
    assert parameters(model) == wanted


def test_encoding_is_the_sines_of_the_paper() -> None:
    x = torch.rand(5, 3, dtype=torch.float64)
    code = PositionalEncoding(4).double()(x)
    wanted = [x, *(wave(2**k * x) for k in range(4) for wave in (torch.sin, torch.cos))]
    assert_close(code, torch.cat(wanted, 1))


def test_e_form_is_the_network_with_equilibrated_weights() -> None:
    plain, conditioned = seeded_nerf("none"), seeded_nerf("none+e@re:trunk")
    points = torch.rand(7, 3)
    for part in ("coarse", "fine"):
        colour, density = getattr(equilibrated(plain), part)(points, points)
        got_colour, got_density = getattr(conditioned, part)(points, points)
        # E may scale a layer's output instead of its weight, which rounds otherwise.
        assert_close(got_colour, colour, rtol=1e-5, atol=1e-6)
        assert_close(got_density, density, rtol=1e-4, atol=1e-6)


def test_e_form_leaves_the_other_layers_alone() -> None:
    plain, conditioned = seeded_nerf("none").fine, seeded_nerf("none+e@re:trunk").fine
    for name in ("density", "features", "view", "colour"):
        assert_close(getattr(conditioned, name).weight, getattr(plain, name).weight, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "sine", "relu"])
def test_occupancy_e_form(kind: str) -> None:
    torch.manual_seed(0)
    plain = occupancy("none", kind, width=16)
    torch.manual_seed(0)
    conditioned = occupancy("none+e@re:trunk", kind, width=16)
    points = torch.rand(9, 3)
    # A sine of 30 u and a Gaussian of u / 0.09 enlarge how differently E rounds, layer after layer.
    assert_close(conditioned(points), equilibrated(plain)(points), rtol=1e-3, atol=1e-3)


def test_density_does_not_see_the_direction() -> None:
    field = RadianceField(width=16, depth=4, skip=1)
    points, one, other = torch.rand(5, 3), torch.rand(5, 3), torch.rand(5, 3)
    (colour, density), (colour_too, density_too) = field(points, one), field(points, other)
    assert_close(density, density_too, rtol=0, atol=0)
    assert not torch.equal(colour, colour_too)


def test_sines_start_with_the_spread_of_siren() -> None:
    torch.manual_seed(0)
    field = OccupancyField("sine")
    h = 2 * torch.rand(4000, 3) - 1
    for layer in field.trunk:
        h = field.activation(layer(h))
    # An arcsine distribution has variance 1/2; units are normal before the sine only roughly.
    assert_close(h.var(), torch.tensor(0.5), rtol=0.1, atol=0)


def test_unknown_kind() -> None:
    with pytest.raises(OptionError, match=r"'gauss'.*'gaussian', 'sine', 'relu'"):
        OccupancyField("gauss")
