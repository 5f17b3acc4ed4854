"""Volume rendering against closed forms."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from foreign_norms import wired
from normkit.lab.data.scene import Rays, Scene, camera_rays, to_ndc
from normkit.lab.data.spheres import see, spheres
from normkit.lab.fields import rendering
from normkit.lab.fields.rendering import Sampling, composite, even_depths, render, weighted_depths
from normkit.lab.models.nerf import NeRF, PositionalEncoding, RadianceField, nerf
from normkit.lab.models.occupancy import OccupancyField, occupancy

ONE = torch.ones(1)


def forward_rays(count: int, far: float = 6.0) -> Rays:
    x = torch.linspace(-1, 1, count)
    origins = torch.stack([x, torch.zeros(count), torch.full((count,), 4.0)], 1)
    looks = torch.tensor([0.0, 0.0, -1.0]).expand(count, 3)
    return Rays(origins, looks, looks, 2.0, far)


def ball(radius: float, density: float) -> nn.Module:
    """A ball of one density about the origin."""

    def forward(self: nn.Module, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        inside = points.norm(dim=-1) < radius
        return torch.tensor([0.2, 0.4, 0.9]).expand_as(points), torch.where(inside, density, -1.0)

    return wired(forward)


def test_even_density_dims_exponentially() -> None:
    depths = torch.linspace(0, 2, 5)[None]
    density = torch.full((1, 5), 0.7)
    density[0, -1] = 0.0  # the last sample reaches to infinity
    shade = composite(torch.ones(1, 5, 3), density, depths, torch.tensor([3.0]))
    assert_close(shade.opacity, torch.tensor([1 - math.exp(-0.7 * 3 * 2)]))
    assert_close(shade.weights[0, 0], torch.tensor(1 - math.exp(-0.7 * 3 * 0.5)))
    shade = composite(torch.ones(1, 3, 3), torch.full((1, 3), 0.1), torch.tensor([[0.0, 1.0, 2.0]]), ONE)
    assert_close(shade.opacity, ONE)  # matter behind the last sample


def test_gradients_of_the_weights() -> None:
    density = torch.tensor([[0.3, 0.9, 0.2, -0.4]], dtype=torch.float64, requires_grad=True)
    colour = torch.rand(1, 4, 3, dtype=torch.float64, requires_grad=True)
    depths = torch.tensor([[0.0, 0.5, 1.5, 1.7]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s, c: composite(c, s, depths, ONE.double()).colour, (density, colour))


def test_a_ball_is_seen_as_its_chord_says() -> None:
    rays = forward_rays(41)
    chord = 2 * (0.5**2 - rays.origins[:, 0] ** 2).clamp_min(0).sqrt()
    shade = rendering.look_along(ball(0.5, 3.0), rays, even_depths(rays, 2000), background=1.0)
    clear = torch.exp(-3.0 * chord)[:, None]
    wanted = (1 - clear) * torch.tensor([0.2, 0.4, 0.9]) + clear
    # A sample is 0.002 long, so that either end of the chord is off by up to that: 3.0 * 0.002 * 2 of thickness.
    assert_close(shade.colour, wanted, rtol=0, atol=0.012)
    balls = torch.tensor([[0.0, 0.0, 0.0, 0.5, 3.0, 0.2, 0.4, 0.9]])
    assert_close(see(rays, balls), shade.colour, rtol=0, atol=0.012)  # the closed form


def test_the_nearer_ball_hides_the_farther() -> None:
    near = [0.0, 0.0, 1.0, 0.5, 1e3, 1.0, 0.0, 0.0]
    far = [0.0, 0.0, -1.0, 0.5, 1e3, 0.0, 1.0, 0.0]
    rays = forward_rays(3).take(torch.tensor([1]))
    for balls in ([near, far], [far, near]):
        assert_close(see(rays, torch.tensor(balls)), torch.tensor([[1.0, 0.0, 0.0]]))


def test_fine_samples_go_where_the_weight_is() -> None:
    depths = torch.linspace(0, 10, 101)[None]
    weights = torch.where((depths > 4) & (depths < 5), 1.0, 0.0)
    drawn = weighted_depths(depths, weights, 200, jitter=True)
    # Outside, 1e-5 for each of 90 samples against 9 full ones leaves a chance of 1e-4.
    assert ((drawn > 3.9) & (drawn < 5.1)).float().mean() > 0.98


def test_fine_samples_follow_the_density() -> None:
    depths = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(2, 4).contiguous()
    weights = torch.tensor([[0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    drawn = weighted_depths(depths, weights, 400)
    share = ((drawn > 0.5) & (drawn < 1.5)).float().mean(1)
    # Of 400 even quantiles a quarter lies below the first mass; without any mass the draw is uniform. 1e-5 shifts nothing.
    assert_close(share, torch.tensor([0.25, 0.5]))


def test_depths_are_stratified() -> None:
    rays = forward_rays(50)
    drawn = even_depths(rays, 16, jitter=True)
    cell = ((drawn - 2.0) / 4.0 * 16).floor()
    assert_close(cell, torch.arange(16.0).expand(50, 16))


def test_ndc_is_the_projection_of_the_paper() -> None:
    height, width, focal, near = 30, 40, (35.0, 36.0), 1.0
    origins = torch.randn(6, 3, dtype=torch.float64) * 0.1
    directions = torch.randn(6, 3, dtype=torch.float64) * 0.3
    directions[:, 2] = -1.2
    start, along = to_ndc(origins, directions, height, width, focal, near)

    def project(p: Tensor) -> Tensor:
        x, y, z = p.unbind(-1)
        return torch.stack([-focal[0] / (width / 2) * x / z, -focal[1] / (height / 2) * y / z, 1 + 2 * near / z], -1)

    plane = origins + (-(near + origins[:, 2:]) / directions[:, 2:]) * directions
    for moved in (0.0, 0.3, 0.9):
        t = near * moved / (-directions[:, 2:] * (1 - moved))
        assert_close(start + moved * along, project(plane + t * directions))
    assert_close((start + along)[:, 2], torch.ones(6, dtype=torch.float64))


def test_rays_go_through_the_pixels() -> None:
    angle = 0.3
    turn = torch.tensor([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
    pose = torch.cat([turn, torch.tensor([[1.0], [2.0], [3.0]])], 1)
    origins, directions = camera_rays(pose, 6, 8, (5.0, 7.0))
    local = (directions @ turn).reshape(6, 8, 3)
    row, column = 4, 1
    assert_close(local[row, column], torch.tensor([(column + 0.5 - 4) / 5, -(row + 0.5 - 3) / 7, -1.0]))
    assert_close(origins, pose[:, 3].expand(48, 3))


def test_a_view_is_one_render_in_pieces() -> None:
    torch.manual_seed(0)
    model = NeRF(width=8, depth=2, skip=0)
    rays = forward_rays(10)
    whole = render(model, rays, Sampling(8, 8))[1]
    colour, depth = rendering.render_view(model, rays, Sampling(8, 8), chunk=3)
    assert_close(colour, whole.colour)
    assert_close(depth, whole.depth)
    assert model.training


def test_the_scene_of_balls() -> None:
    scene = spheres(16, views=9)
    assert scene.test == (0, 8)
    assert isinstance(scene, Scene)
    assert scene.size == (16, 16)
    assert_close(scene.images[0, 0, 0], torch.ones(3))  # a corner sees nothing but white
    assert 0.2 < float((scene.images < 0.95).any(-1).float().mean()) < 0.7
    assert_close(see(scene.rays((3,))), scene.colours((3,)))
    # Cameras look at the origin from 4 away, upright.
    assert_close(scene.poses[:, :, 3], 4 * scene.poses[:, :, 2])
    assert bool((scene.poses[:, 1, 1] > 0).all())


def equilibrated(model: nn.Module) -> nn.Module:
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
def test_parameters_of_fields(model: nn.Module, wanted: int) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == wanted


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
