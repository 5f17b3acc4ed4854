import importlib.util
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import make, published
from normkit.core.errors import NotationError, SurgeryError
from normkit.surgery.norms import is_norm, read_norm
from normkit.surgery.recipe import Recipe, apply_recipe
from normkit.surgery.select import PLACES
from normkit.surgery.target import Target, norm_cards
from normkit.surgery.watch import run_on, tensors_in

WITHOUT = importlib.util.find_spec("transformers") is None
needs_transformers = pytest.mark.skipif(WITHOUT, reason="transformers is not installed")


class Net(nn.Module):
    """A user's own module: branches, a module in two places, a norm in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.twice = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8), nn.ReLU())
        self.norms = nn.ModuleDict({"last": nn.LayerNorm(8)})
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)))
        return self.head(self.norms["last"](x.mean((2, 3))))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("bn", "bn"),
        (" BN + E ", "bn+e"),
        ("bn+e:row@first_last", "bn+e"),
        ("group_norm", "gn:32"),
        ("gn:08+ws@convolutions+wn@all", "gn:8+ws+wn"),
        ("gn:gcd032", "gn:gcd32"),
        ("ln:c*", "ln:c *"),
        ("ghost", "ghost:16"),
        ("mean-only+wn", "mean_only+wn"),
        ("BatchGroupNorm : 8x4", "bgn:8x4"),
        ("keep+e:col@hidden", "keep+e:col@hidden"),
        ("none+weight_norm", "none+wn"),
        ("layer_norm:c+sn@re:^a.b$", "ln:c+sn@re:^a.b$"),
        ("ln+e@re:conv\\d++wn@re:x+", "ln+e@re:conv\\d++wn@re:x+"),
        ("rms + e:rowcol @ all", "rms+e:rowcol@all"),
        ("in+e:row@re:first+e:col@re:last", "in+e@re:first+e:col@re:last"),
    ],
)
def test_recipes_are_read_and_written_in_one_way(text, canonical):
    recipe = Recipe.parse(text)
    assert str(recipe) == canonical
    assert Recipe.parse(canonical) == recipe


def test_a_plus_in_a_pattern_belongs_to_the_pattern():
    first, second = Recipe.parse(r"bn+e@re:a\d+b+wn@all").weights
    assert (first.where, second.word) == (r"re:a\d+b", "wn")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bm", r"'bm' is not known; did you mean 'bn'\?; norms that exist: none, bn, .*ghost:SIZE, .*gn:GROUPS.*keep"),
        ("bn+we", r"weight method 'we' is not known.*exist: .*wn.*e, e:col, e:rowcol"),
        ("bn+e:diag", r"e got the mode 'diag'; modes that exist: row, col, rowcol"),
        ("bn+ws:row", r"ws got the mode 'row'; modes that exist: none"),
        ("bn+e@first", r"'first' is not known.*first_last, all, hidden"),
        ("bn+e@re:(", r"can't be read"),
        ("e", r"begins with 'e'; a norm comes first: keep"),
        ("ws+bn", r"begins with 'ws'"),
        ("", r"begins without a norm"),
        ("bn+", r"missing after \+"),
        ("bn+ln", r"'ln' is a norm; one norm comes first"),
        ("bn@all", r"has a place"),
        ("bn+e+e", r"e is said twice of first_last"),
        ("bn+e:row+e:col@first_last", r"e is said twice"),
        ("keep:2", r"'keep' is not known"),
        ("gn:0", r"wanted a whole number from 1, or gcd32 .*, e\.g\. gn:32$"),
        ("none:2", r"takes no option; write none$"),
        ("ghots", r"did you mean 'ghost'"),
        ("bgn:8", r"got GROUPSxEXAMPLES '8', wanted .*32x2"),
        ("prms:2", r"got FRACTION '2', wanted a number above 0 and at most 1, e\.g\. prms:0\.0625"),
        ("igdn", r"'igdn' is not known.*igdn can't stand in a norm's place: it undoes gdn"),
        ("film", r"film can't stand in a norm's place: it takes a condition"),
        (None, r"recipe None is no text; wanted .*'bn\+e'"),
    ],
)
def test_what_cannot_be_read_lists_what_exists(text, message):
    with pytest.raises(NotationError, match=message):
        Recipe.parse(text)


def test_rows_tell_everything_that_was_done():
    rows = apply_recipe(Net(), "gn:4+ws+e").rows
    assert [(row.layer, row.before, row.after) for row in rows] == [
        ("stem.1", "BatchNorm2d(8)", "GroupNorm(4, 8)"),
        ("twice.1", "GroupNorm(2, 8)", "GroupNorm(4, 8)"),
        ("norms.last", "LayerNorm(8)", "GroupNorm(4, 8, layout='n * c')"),
        ("stem.0", "Conv2d 8x1x3x3", "weight_standardization"),
        ("twice.0", "Conv2d 8x4x3x3", "weight_standardization"),
        ("stem.0", "Conv2d 8x1x3x3", "weight_conditioning:row"),
        ("head", "Linear 4x8", "weight_conditioning:row"),
    ]
    assert str(rows[0]) == "stem.1: BatchNorm2d(8) -> GroupNorm(4, 8) (running statistics dropped)"
    table = str(apply_recipe(Net(), "bn")).splitlines()
    assert table[0].split() == ["layer", "before", "after", "note"]
    assert len({line.index("BatchNorm(8") for line in table[1:]}) == 1
    assert str(apply_recipe(Net(), "keep")) == "nothing changed"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("gn:3+e", r"^gn:3\+e: stem\.1: 8 channels do not split into 3 groups; .*1, 2, 4, 8; choose .*, or gcd3"),
        ("ln+e@re:fc", r"ln\+e@re:fc: e@re:fc: 're:fc' chooses nothing"),
        ("ln+e+wn", r"^ln\+e\+wn: stem\.0: weight_norm can't be put on it: .*come first"),
        ("ln+e@all+e:col", r"stem\.0: weight_conditioning:col is on it already"),
        ("ln+e@re:norms", r"chooses nothing"),
    ],
)
def test_a_recipe_that_fails_leaves_the_model_as_it_was(recipe, message):
    model, x = Net(), torch.randn(6, 1, 6, 6)
    hook = model.stem[1].register_forward_hook(lambda module, args, output: None)
    state, kinds, wanted = list(model.state_dict()), [type(module) for module in model.modules()], model.eval()(x)
    with pytest.raises(SurgeryError, match=message):
        apply_recipe(model, recipe)
    assert list(model.state_dict()) == state
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)
    hook.remove()
    assert not model.stem[1]._forward_hooks


def test_a_failing_example_undoes_weights_too():
    model = Net()
    with pytest.raises(SurgeryError, match="does not run on the example"):
        apply_recipe(model, "ln+e@all", torch.randn(2, 3, 6, 6))
    assert type(model.head) is nn.Linear
    assert "weight" in dict(model.head.named_parameters())
    assert type(model.stem[1]) is nn.BatchNorm2d
    model(torch.randn(2, 1, 6, 6))


def test_state_dict_names():
    model = Net()
    apply_recipe(model, "bn+wn@re:head+e@re:stem")
    keys = list(model.state_dict())
    assert "stem.0.parametrizations.weight.original" in keys
    assert "head.parametrizations.weight.original0" in keys
    assert "norms.last.running_mean" in keys


def test_the_words_and_places_of_the_page():
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    words = [str(Target.parse(card.word)) for card in norm_cards().values()]
    assert all(f"`{word}`" in page for word in [*PLACES, *words, "ln:c", "ln:c *", "gn"])
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ConvTranspose2d(64, 4, 3), nn.Linear(4, 2))
    rows = apply_recipe(deepcopy(model), "gn+wn@convolutions").rows
    after = {"1": "GroupNorm(32, 64)", "0": "weight_norm", "2": "weight_norm"}
    assert {row.layer: row.after for row in rows} == after
    for word, over in (("ln:c", "c"), ("rms:c", "c"), ("ln", "c *"), ("rms", "c *")):
        assert f"over={over!r}" in apply_recipe(deepcopy(model), word).rows[0].after


def test_no_norm_to_convert_is_said():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SurgeryError, match=r"^bn: .*no activation norm to convert to bn; begin .* with keep or none"):
        apply_recipe(model, "bn")
    assert len(apply_recipe(model, "none")) == 0


def tiny(name: str) -> tuple[nn.Module, Any]:
    """A transformers model with random weights, and an input."""
    if name != "GPT2":
        return make(name)
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return published("GPT2LMHeadModel", **sizes), {"input_ids": torch.tensor([[1, 5, 3, 7], [2, 2, 8, 4]])}


def result(model: nn.Module, x: Any) -> Tensor:
    return next(tensors_in(run_on(model, x)))


@needs_transformers
@pytest.mark.parametrize("name", ["Bert", "Llama", "Gemma", "Olmo", "GPT2", "T5Encoder", "ViT", "ConvNextV2"])
@pytest.mark.parametrize("recipe", ["bn+e", "gn:4", "ln", "rms+e:col@all", "dyt", "keep+e@all"])
def test_transformers_models_train_under_recipes(name, recipe):
    model, x = tiny(name)
    if recipe == "bn+e" and name == "ConvNextV2":
        x = {"pixel_values": torch.randn(4, 3, 64, 64)}
    model.train()
    kinds = {type(module) for module in model.modules()}
    changes = apply_recipe(model, recipe, x)
    assert len(changes) or (recipe == "ln" and (nn.LayerNorm in kinds or name == "Olmo"))
    result(model, x).square().mean().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)
    model.eval()
    torch.testing.assert_close(result(deepcopy(model), x), result(model, x))


@needs_transformers
@pytest.mark.parametrize(
    "way", ["Llama gn:1 rms", "Gemma ln rms", "T5Encoder gn:4 rms", "Bert rms ln", "Bert gn:1 ln", "Olmo gn:1 ln"]
)
def test_norms_of_transformers_are_read_exactly(way):
    name, there, back = way.split()
    model, x = tiny(name)
    for module in model.modules():  # the way over rms drops the biases
        if isinstance(module, nn.LayerNorm) and name == "Bert":
            module.bias.data.zero_()
    wanted = result(model, x)
    apply_recipe(model, there)
    assert not torch.allclose(result(model, x), wanted)
    apply_recipe(model, back)
    torch.testing.assert_close(result(model, x), wanted, rtol=1e-4, atol=1e-5)  # float32 through two blocks


@needs_transformers
@pytest.mark.parametrize("recipe", ["ln", "rms"])
def test_all_norms_of_a_convnext_stay_norms_of_each_position(recipe):
    model, x = tiny("ConvNextV2")
    apply_recipe(model, recipe, x)
    norms = [module for module in model.modules() if is_norm(module)]
    assert len(norms) == 9
    assert {read_norm("", norm).alone for norm in norms} == {True}


@needs_transformers
def test_tied_weights_stay_tied():
    model, x = tiny("GPT2")
    embedding = model.transformer.wte.weight
    changes = apply_recipe(model, "keep+e@all", x)
    assert model.lm_head.parametrizations.weight.original is embedding
    (note,) = (row.note for row in changes if row.layer == "lm_head")
    assert "raw weight stays tied to transformer.wte.weight" in note
    result(model, x).square().mean().backward()
    before = embedding.detach().clone()
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert not torch.equal(before, embedding)
    assert model.lm_head.parametrizations.weight.original is embedding
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    model, _ = tiny("GPT2")
    with pytest.raises(SurgeryError, match=r"lm_head: its weight is tied to transformer\.wte\.weight.*untie them"):
        apply_recipe(model, "keep+wn")
    assert model.lm_head.weight is model.transformer.wte.weight


@needs_transformers
def test_gpt2_rows_are_its_output_units():
    model, _ = tiny("GPT2")
    apply_recipe(model, "keep+e@all")
    weight = model.transformer.h[0].attn.c_attn.weight
    torch.testing.assert_close(weight.norm(dim=0), torch.ones(48))  # (in, out)
