"""The words of activation methods in recipes: a law over the catalogue, on a CNN, a transformer and a ConvNeXt."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import laws
from foreign_norms import ChannelsNorm
from laws import ACTIVATIONS
from normkit.core.card import Card
from normkit.core.errors import NotationError, SurgeryError
from normkit.surgery.norms import is_norm
from normkit.surgery.recipe import Recipe, applicable_words, apply_recipe, why_not
from normkit.surgery.target import Target

WORDS = [card for card in ACTIVATIONS if card.word]
# Theirs is a floor, stands outside the root, or is none at all.
OWN_EPS = "mean_only_batch_norm partial_rms_norm scale_norm dynamic_tanh dynamic_erf holo_norm divisive_norm".split()


class ConvNeXt(nn.Module):
    """A stem and a block: a norm with channels first, one with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 2, stride=2), ChannelsNorm(32))
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.LayerNorm(32, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.mlp(self.norm(self.depthwise(x).movedim(1, -1))).movedim(-1, 1)


def cnn() -> nn.Module:
    convs, norms = (nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3)), (nn.BatchNorm2d(32), nn.BatchNorm2d(32))
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1])


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32))


MODELS = {"cnn": (cnn, (4, 3, 8, 8)), "transformer": (transformer, (4, 6, 32)), "convnext": (ConvNeXt, (4, 3, 8, 8))}
# Where each model has channels; a method that does not read all of a model's layouts is refused there.
LAYOUTS = {"cnn": {"n c *"}, "transformer": {"n * c"}, "convnext": {"n c *", "n * c"}}


def stands(card: Card, model: str) -> bool:
    return LAYOUTS[model] <= set(card.axes)


@pytest.mark.parametrize("card", ACTIVATIONS, ids=laws.name)
def test_every_activation_method_has_a_word_that_stands_somewhere_or_a_reason(card: Card) -> None:
    assert bool(card.word) != bool(card.wordless)
    if card.word:
        assert any(stands(card, model) for model in MODELS)
        assert str(Recipe.parse(card.name)) == str(Target.parse(card.word))
        assert str(Target.parse(str(Target.parse(card.word)))) == str(Target.parse(card.word))
        assert card.words.startswith(card.word)
    else:
        with pytest.raises(NotationError, match=card.wordless[:30].replace("(", ".")):
            Recipe.parse(card.name)


@pytest.mark.parametrize("card", WORDS, ids=laws.name)
def test_an_option_that_cannot_be_read_says_what_is_wanted(card: Card) -> None:
    wanted = f"takes no option; write {card.word}" if card.option is None else f"{card.option.name}.*wanted"
    with pytest.raises(NotationError, match=wanted):
        Recipe.parse(f"{card.word}:nonsense")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("card", WORDS, ids=laws.name)
def test_every_word_stands_in_a_model_or_says_why_not(card: Card, model: str) -> None:
    make, shape = MODELS[model]
    net, x = make().double(), torch.randn(shape, dtype=torch.float64)
    recipe, wanted = f"{card.word}+wn@all" if model == "cnn" else card.word, net(x).shape
    before = {name: module for name, module in net.named_modules() if is_norm(module)}
    if not stands(card, model):
        with pytest.raises(SurgeryError, match=rf"{card.word}.* reads .* the input here has"):
            apply_recipe(net, recipe, x)
        left = apply_recipe(net, recipe, x, on_refusal="leave").passed_over
        fitting = LAYOUTS[model] & set(card.axes)
        assert (len(left) < len(before)) == bool(fitting)
        return
    changes = apply_recipe(net, recipe, x)
    after = dict(net.named_modules())
    for name in before:
        # torch's own layer of the method, which the class derives from, may stay.
        torchs = tuple(kind for kind in card.module.__mro__[:-2] if kind.__module__.startswith("torch."))
        assert isinstance(after[name], card.module) or isinstance(before[name], torchs)
    assert not changes.passed_over
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        y = net(x)
        assert y.shape == wanted
        y.square().mean().backward()
        optimizer.step()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
    net.eval()
    twin = make().double().eval()
    apply_recipe(twin, recipe)
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(x), net(x))
    torch.testing.assert_close(deepcopy(net)(x), net(x))


@pytest.mark.parametrize("card", [card for card in WORDS if not card.accompanies], ids=laws.name)
def test_a_norm_that_stands_by_its_word_is_read_back(card: Card) -> None:
    make, shape = MODELS["cnn" if stands(card, "cnn") else "transformer"]
    net, x = make().double(), torch.randn(shape, dtype=torch.float64)
    back = Target.parse("bn" if stands(card, "cnn") else "ln")
    old = {name: module for name, module in net.named_modules() if is_norm(module)}
    weights = {name: module.weight for name, module in old.items()}
    apply_recipe(net, card.word, x)
    assert len(apply_recipe(net, card.word, x)) == 0
    assert [name for name, module in net.named_modules() if is_norm(module)] == list(old)
    apply_recipe(net, str(back), x)
    for name, module in net.named_modules():
        if name in old:
            assert module.eps == old[name].eps or card.name in OWN_EPS
            if {"weight", "bias"} <= set(card.takes) and list(card.make(4).parameters()):
                assert module.weight is weights[name]


@pytest.mark.parametrize("card", [card for card in WORDS if card.accompanies], ids=laws.name)
def test_what_accompanies_a_norm_is_never_converted(card: Card) -> None:
    net = nn.Sequential(nn.BatchNorm2d(8), card.make(8))
    kept = net[1]
    assert [row.layer for row in apply_recipe(net, "gn:2")] == ["0"]
    assert net[1] is kept


@pytest.mark.parametrize("card", WORDS, ids=laws.name)
def test_statistics_reach_over_the_axes_that_the_card_says(card: Card) -> None:
    """What an output depends on besides the element it stands at: other positions, and other samples in training."""
    layer = laws.layer(card)
    x = laws.sample_input(card).requires_grad_()
    moved = (lambda t: t) if laws.channels_first(card) else (lambda t: t.transpose(1, 2))
    seen = []
    for training in (True, False):
        y = layer.train(training)(x)
        (gradient,) = torch.autograd.grad(moved(y)[0, 0, 0], x)
        gradient = moved(gradient)
        seen.append(bool(gradient[0, :, 1:].any()))
        others = bool(gradient[1:].any())
        assert others == (card.batch_dependent and training) or not card.exact_gradient
    assert any(seen) == ("*" in card.reach) or not card.exact_gradient


@pytest.mark.parametrize("model", MODELS)
def test_the_words_that_apply_are_those_that_stand(model: str) -> None:
    make, shape = MODELS[model]
    net, x = make(), torch.randn(shape)
    wanted, state, kinds = net.eval()(x), net.state_dict(), [type(module) for module in net.modules()]
    seed = torch.get_rng_state()
    for example in (None, x):
        found = applicable_words(net, example)
        assert found["keep"] == found["none"] == found["keep+wn"] == ""
        assert (found["keep+ws"] == "") == (model != "transformer")
        for card in WORDS:
            assert (found[card.word] == "") == stands(card, model), found[card.word]
    assert torch.equal(torch.get_rng_state(), seed)
    assert [type(module) for module in net.modules()] == kinds
    assert list(net.state_dict()) == list(state)
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("recipe", "after"),
    [
        ("ghost:4", "GhostBatchNorm(32, size=4)"),
        ("gn:gcd12", "GroupNorm(4, 32)"),
        ("bgn:gcd12x2", "BatchGroupNorm(32, groupsxexamples=4x2)"),
        ("bcn:8", "BatchChannelNorm(32, groups=8)"),
        ("weigh:0.25", "BatchGroupNorm(32, alpha=0.25)"),
        ("renorm:2000", "BatchRenorm(32, steps=2000)"),
        ("frn:tlu", "FilterResponseNorm(32, tlu)"),
        ("context:7", "LocalContextNorm(32, window=7)"),
        ("dyt:0.25", "DynamicTanh(32, alpha=0.25)"),
        ("rms:c", "RMSNorm(32, over='c')"),
    ],
)
def test_an_option_is_built_read_and_shown(recipe: str, after: str) -> None:
    model = cnn()
    assert {row.after for row in apply_recipe(model, recipe)} == {after}
    assert len(apply_recipe(model, recipe)) == 0


@pytest.mark.parametrize("started", [False, True])
def test_trying_words_leaves_all_generators_as_they_were(started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    put_back = []
    for key, stand_in in {
        "is_initialized": lambda: started,
        "device_count": lambda: 2,
        "get_rng_state": lambda device: device,
        "set_rng_state": lambda state, device: put_back.append((state, device)),
    }.items():
        monkeypatch.setattr(torch.cuda, key, stand_in)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    state = torch.get_rng_state()
    assert not why_not(model, "bn+sn")
    assert torch.equal(torch.get_rng_state(), state)
    assert put_back == ([(0, 0), (1, 1)] if started else [])
