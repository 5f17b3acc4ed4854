"""The networks of the lab: sizes as published, shapes, independent forms of the same computation, and every recipe."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from foreign_norms import random_
from normkit.core.errors import OptionError
from normkit.lab.data.sequences import TASKS, draw, guess, text
from normkit.lab.jobs.adversarial import centres, ring
from normkit.lab.models.convolutional import (
    DenseLayer,
    DenseNet,
    ResidualBlock,
    densenet,
    googlenet,
    inception8,
    resnet18,
    resnet50,
    scaled,
)
from normkit.lab.models.vit import (
    Block,
    DiT,
    Encoder,
    VisionTransformer,
    dit_block,
    grid_positions,
    vit_b16,
    vit_s,
    vit_tiny,
)
from normkit.lab.protocol import MODELS, load_factory, make_model
from normkit.surgery.recipe import apply_recipe


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small_vit(classes: int = 10) -> nn.Module:
    return VisionTransformer(size=32, patch=8, features=24, depth=2, heads=3, classes=classes)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "inception8": lambda: inception8(width=0.25),
    "densenet": lambda: densenet(width=0.25),
    "googlenet": lambda: googlenet(width=1 / 16),
    "resnet18": lambda: resnet18(width=1 / 16),
    "resnet50": lambda: resnet50(width=1 / 16),
    "vit": small_vit,
}


@pytest.mark.parametrize(
    ("factory", "ten", "hundred"),
    [
        (inception8, 260_650, 272_260), (densenet, 239_146, 255_796), (googlenet, 6_310_314, 6_402_564),
        (resnet18, 11_173_962, 11_220_132), (resnet50, 23_520_842, 23_705_252), (vit_tiny, 2_693_578, 2_710_948),
        (vit_s, 21_342_346, 21_376_996),
    ],
)  # fmt: skip
def test_parameters(factory: Callable[..., nn.Module], ten: int, hundred: int) -> None:
    with torch.device("meta"):
        assert (count(factory(classes=10)), count(factory(classes=100))) == (ten, hundred)


def test_vit_b16_is_timms() -> None:
    with torch.device("meta"):
        model = vit_b16()
    assert count(model) == 86_567_656
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert (shapes["patch_embed.proj.weight"], shapes["pos_embed"]) == ((768, 3, 16, 16), (1, 197, 768))
    assert (shapes["blocks.11.attn.qkv.weight"], shapes["blocks.11.mlp.fc1.weight"]) == ((2304, 768), (3072, 768))
    assert shapes["head.weight"] == (1000, 768)


@pytest.mark.parametrize("name", MODELS)
def test_built_in_names(name: str) -> None:
    assert count(make_model(load_factory(name, MODELS), name, 10)) > 0


@pytest.mark.parametrize("name", SMALL)
def test_maps_images_to_logits(name: str) -> None:
    model = SMALL[name]()
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert all(parameter.grad is None for parameter in model.parameters())
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    first, *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    assert isinstance(first, nn.Conv2d)
    assert (first.in_channels, last.out_features) == (3, 10)  # those that see the image and the logits


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("recipe", ["none", "bn+e", "bn+ws", "bn+wn", "gn:1", "ln+e@all", "in"])
def test_takes_recipes(name: str, recipe: str) -> None:
    model = apply_recipe(SMALL[name](), recipe).model
    x = torch.randn(4, 3, 32, 32)
    kept = x.clone()
    model(x).square().mean().backward()
    # Where a norm was taken out, an activation that writes in place would write into its input.
    assert_close(x, kept, rtol=0, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_inception8_blocks_see_32_16_and_8() -> None:
    model, sizes = inception8(width=0.25), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    full = [(64, 32), (96, 32), (96, 16), (96, 16), (96, 16), (96, 16), (128, 16), (128, 8), (128, 8), (128, 8)]
    assert sizes == [(channels // 4, side, side) for channels, side in full]


def test_densenet_grows_and_halves() -> None:
    model = DenseNet()
    blocks = [block for block in model.blocks if isinstance(block, DenseLayer)]
    widths = [block(torch.zeros(1, block.layers[0].num_features, 2, 2)).shape[1] for block in blocks]
    assert widths == [*range(48, 129, 16), *range(80, 161, 16), *range(96, 177, 16), *range(104, 185, 16)]
    assert model.classifier.in_features == 184


def test_width() -> None:
    wide = [m.out_channels for m in inception8().modules() if isinstance(m, nn.Conv2d)]
    half = [m.out_channels for m in inception8(width=0.5).modules() if isinstance(m, nn.Conv2d)]
    assert half == [scaled(channels, 0.5) for channels in wide]
    for factory in (inception8, densenet, googlenet, resnet18, resnet50):
        with pytest.raises(OptionError, match=r"width is 0; wanted a factor above 0"):
            factory(width=0)


def test_residual_blocks_against_functional_calls() -> None:
    block = ResidualBlock(4, 3, 2, expansion=4).eval().double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.double)

    def unit(layers: nn.Module, place: int, y: Tensor, **options: int) -> Tensor:
        norm = layers[place + 1]
        y = functional.conv2d(y, layers[place].weight, **options)
        return functional.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    y = unit(block.branch, 0, x).relu()
    y = unit(block.branch, 3, y, stride=2, padding=1).relu()
    y = unit(block.branch, 6, y) + unit(block.shortcut, 0, x, stride=2)
    assert_close(block(x), y.relu())
    assert isinstance(ResidualBlock(4, 4, 1).shortcut, nn.Identity)


def test_vit_block_is_torchs_encoder_layer() -> None:
    ours = Block(12, 3).double()
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    theirs = nn.TransformerEncoderLayer(12, 3, 48, layer_norm_eps=1e-6, **options).double()
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_": "attn.", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    state = theirs.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    ours.load_state_dict(state)
    x = torch.randn(2, 5, 12, dtype=torch.double)
    assert_close(ours(x), theirs(x))


def test_vit_patches_are_linear_maps_of_squares() -> None:
    model = VisionTransformer(size=8, patch=4, features=12, depth=1, heads=3).double()
    image = torch.randn(1, 3, 8, 8, dtype=torch.double)
    squares = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(1, 4, 48)
    expected = squares @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    assert_close(model.patch_embed(image), expected)


def test_dit_starts_as_zero_and_every_block_as_the_identity() -> None:
    block, tokens = dit_block(8, 2), torch.randn(2, 5, 8)
    assert_close(block(tokens, torch.randn(2, 8)), tokens, rtol=0, atol=0)
    model = DiT(size=8, features=16, depth=2, heads=2)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 9.0]), torch.tensor([0, 10])
    assert model(x, t, y).abs().max() == 0
    assert model(x=x, t=t, y=y).shape == x.shape


def test_dit_after_training_depends_on_time_and_class_and_puts_pixels_in_their_place() -> None:
    model = DiT(size=8, features=16, depth=2, heads=2)
    random_(model, 0.3)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 1.0]), torch.tensor([3, 3])
    out = model(x, t, y)
    assert (model(x, t + 5, y) - out).abs().max() > 1e-3
    assert (model(x, t, y + 1) - out).abs().max() > 1e-3
    # A bias of the last layer for one channel of one pixel of a patch shows at that pixel of every patch, and nowhere else.
    with torch.no_grad():
        model.output.linear.bias.view(4, 4, 3)[1, 2, 0] += 1
    expected = torch.zeros_like(x)
    expected[:, 0, 1::4, 2::4] = 1
    # Two float32 forward passes subtracted: equal up to rounding of values near 10.
    assert_close(model(x, t, y) - out, expected, rtol=0, atol=1e-4)


def test_grid_positions_differ_everywhere() -> None:
    positions = grid_positions(8, 16)
    distance = torch.cdist(positions, positions) + torch.eye(64)
    assert distance.min() > 0.1


def test_points_lie_on_the_ring() -> None:
    points = ring(4000, torch.Generator().manual_seed(0))
    distances = torch.cdist(points, centres())
    nearest = distances.min(1)
    # Of a Gaussian in the plane 1.1 % lies beyond three deviations.
    assert (nearest.values > 0.15).float().mean() < 0.02
    assert torch.bincount(nearest.indices, minlength=8).min() > 400
    assert_close(centres(4, 1.0), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_it_equals_the_layers_of_torch(placement: str) -> None:
    torch.manual_seed(0)
    ours = Encoder(11, 7, features=12, depth=2, heads=3, placement=placement).double().eval()
    options = {"dropout": 0.0, "batch_first": True, "norm_first": placement == "pre"}
    theirs = nn.ModuleList(nn.TransformerEncoderLayer(12, 3, 48, **options) for _ in range(2))
    for k, layer in enumerate(theirs.double().eval()):
        attention, feed = ours.layers[2 * k], ours.layers[2 * k + 1]
        layer.self_attn.load_state_dict(
            {
                "in_proj_weight": attention.sublayer.qkv.weight,
                "in_proj_bias": attention.sublayer.qkv.bias,
                "out_proj.weight": attention.sublayer.proj.weight,
                "out_proj.bias": attention.sublayer.proj.bias,
            }
        )
        layer.linear1.load_state_dict(feed.sublayer[0].state_dict())
        layer.linear2.load_state_dict(feed.sublayer[2].state_dict())
    tokens = torch.randint(11, (2, 7))
    x = (ours.words(tokens) + ours.places) / 2**0.5
    for layer in theirs:
        x = layer(x)
    assert ours.head is not None
    expected = ours.head(x if placement == "post" else nn.functional.layer_norm(x, (12,)))
    assert_close(ours(tokens), expected)


def test_a_causal_encoder_sees_nothing_of_what_follows() -> None:
    model = Encoder(11, 7, features=8, depth=2, heads=2, causal=True)
    tokens = torch.randint(11, (1, 7))
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    assert_close(model(tokens)[:, :4], model(other)[:, :4])


@pytest.mark.parametrize("norm", ["ln", "rms", "scale"])
@pytest.mark.parametrize("fix", [False, True])
def test_every_norm_and_head_trains(norm: str, fix: bool) -> None:
    model = Encoder(11, 7, features=8, depth=1, heads=2, norm=norm, fix=fix, placement="pre")
    model(torch.randint(11, (2, 7))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_sequences_and_targets_have_one_shape(task: str) -> None:
    torch.manual_seed(1)
    tokens, targets = draw(task, 5, 9)
    assert tokens.shape == targets.shape == (5, 9)
    torch.manual_seed(1)
    assert_close(draw(task, 5, 9), (tokens, targets))
    assert 0 < guess(task) < 5


def test_the_targets_are_what_the_tasks_say() -> None:
    tokens, targets = draw("add", 3, 4, vocabulary=5)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert wanted == [(row[k] + row[k - 1]) % 5 for k in range(4)]
    tokens, targets = draw("text", 2, 30)
    assert_close(tokens[:, 1:], targets[:, :-1])
    codes, characters = text()
    passage = "".join(characters[code] for code in tokens[0])
    assert passage in "".join(characters[code] for code in codes)
