import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import parametrize

from foreign_norms import lived_in, wired
from normkit import BatchNorm, BatchRenorm, GhostBatchNorm, MeanOnlyBatchNorm, apply_recipe, fold
from normkit.core.errors import SurgeryError
from normkit.weights import weight_conditioning, weight_norm

# What a chain of three layers may lose to rounding when its factors are multiplied in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


CASES = {
    "conv": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), (2, 3, 5, 5)),
    "no bias": (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), (2, 3, 5, 5)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 4, 5, 5)),
    "padded": (nn.Conv1d(4, 8, 3, padding=2, padding_mode="circular"), nn.BatchNorm1d(8), (2, 4, 5)),
    "3d": (nn.Conv3d(2, 4, 2), BatchNorm(4), (2, 2, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), BatchNorm(6), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "tokens": (nn.Linear(4, 6, bias=False), BatchNorm(6, layout="n * c"), (3, 5, 4)),
    "no affine": (nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), (3, 4)),
    "renorm": (nn.ConvTranspose2d(4, 6, 3, groups=2), BatchRenorm(6), (2, 4, 5, 5)),
    "renorm, no bias": (nn.Linear(4, 6), BatchRenorm(6, bias=False, layout="n * c"), (3, 5, 4)),
    "mean only": (nn.Conv2d(3, 8, 3, bias=False), MeanOnlyBatchNorm(8), (2, 3, 5, 5)),
    "ghost": (nn.Conv2d(3, 8, 3), GhostBatchNorm(8, 2, memory="moments"), (2, 3, 5, 5)),
    "no beta": (nn.Conv2d(3, 8, 3), BatchNorm(8, bias=False), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_batch_norm_goes_into_the_layer_before_it(case):
    layer, norm, shape = CASES[case]
    model = lived_in(nn.Sequential(deepcopy(layer), deepcopy(norm), nn.ReLU()))
    x = torch.randn(shape, dtype=torch.float64)
    wanted, before = model(x), deepcopy(model)
    changes = fold(model, x)
    assert isinstance(model[1], nn.Identity)
    assert changes.rows[0].note == "folded into 0"
    assert (changes.rows[0].error or 0.0) < 1e-12
    assert not changes.passed_over
    torch.testing.assert_close(model(x), wanted, **CLOSE)
    # The proof is on the example; the equality is not.
    other = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(other), before(other), **CLOSE)


class Branches(nn.Module):
    """Where folding is wrong: outputs that are read elsewhere, or by way of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.through, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.inplace, self.c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.d, self.e = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.borrowed, self.f = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.good, self.g = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.unused = nn.BatchNorm2d(4)
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read_twice(x)
        x = x + self.a(x)
        x = self.b(torch.relu(self.through(x)))
        y = self.inplace(x)
        y.relu_()
        x = self.c(y)
        x = self.e(self.shared(self.d(self.shared(x))))
        y = self.f(self.borrowed(x))
        x = y + nn.functional.conv2d(x, self.borrowed.weight)
        return self.stateless(self.g(self.good(x)))


def test_members_of_the_family_that_have_nothing_to_fold_by_are_left():
    norms = [MeanOnlyBatchNorm(4, track_running_stats=False), nn.BatchNorm1d(4, track_running_stats=False)]
    changed = BatchRenorm(4)
    changed.forward = lambda x: x * x  # pyright: ignore
    for norm, note in zip([*norms, changed], [*2 * ["no running statistics"], "replaced"], strict=True):
        model = lived_in(nn.Sequential(nn.Linear(3, 4), norm))
        assert note in fold(model, torch.randn(2, 3).double()).passed_over[0].reason


def test_only_what_can_be_folded_is_folded():
    model, x = lived_in(Branches()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    wanted = model(x)
    changes = fold(model, x)
    notes = {left.layer: left.reason for left in changes.passed_over}
    torch.testing.assert_close(model(x), wanted, **CLOSE)
    assert [row.note for row in changes] == ["folded into inplace", "folded into good"]
    assert "read elsewhere" in notes["a"]
    assert "read elsewhere" in notes["c"]
    assert "read elsewhere" in notes["d"]
    assert "weight of the layer before it is read elsewhere" in notes["f"]
    assert "does not reach it" in notes["unused"]
    assert "not the very output" in notes["stateless"]


def test_the_output_of_the_model_is_read():

    def both(self: Any, x: Tensor) -> dict[str, Tensor]:
        features = self.conv(x)
        return {"features": features, "logits": self.norm(features)}

    model = lived_in(wired(both, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4)))
    assert "read elsewhere" in fold(model, {"x": torch.randn(2, 3, 4, 4, dtype=torch.float64)}).passed_over[0].reason


class Squashing(nn.Linear):
    """Computes with another weight than it holds, as no fold can know."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, torch.tanh(self.weight), self.bias)


def test_a_fold_that_changes_the_output_is_undone():
    model, x = lived_in(nn.Sequential(Squashing(3, 4), nn.BatchNorm1d(4))), torch.randn(2, 3).double()
    wanted, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    changes = fold(model, x)
    assert changes.rows == ()
    assert "changes the output by" in changes.passed_over[0].reason
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_layers_with_hooks_and_channels_elsewhere_are_left():
    model, x = lived_in(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3))), torch.randn(2, 3, 4).double()
    model[1] = lived_in(nn.BatchNorm1d(3))
    assert "channels are not the output channels" in fold(model, x).passed_over[0].reason
    model, x = lived_in(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))), torch.randn(2, 4).double()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    assert "hooks" in fold(model, x).passed_over[0].reason


@pytest.mark.parametrize(
    "recipe", ["keep+ws", "keep+wn", "keep+sn", "keep+e@all", "keep+e:col", "keep+ws+e@all", "bn+wn+e:rowcol"]
)
def test_parametrizations_are_baked_in_exactly(recipe):
    images = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 3, groups=2)
    net = nn.Sequential(*images, nn.Flatten(), nn.Linear(150, 4))
    model, x = lived_in(net), torch.randn(2, 3, 5, 5).double()
    plain = list(model.state_dict())
    model[0].weight.requires_grad_(False)
    apply_recipe(model, recipe)
    model.eval()
    wanted = model(x)
    fold(model)
    torch.testing.assert_close(model(x), wanted, **CLOSE)
    assert sorted(model.state_dict()) == sorted(plain)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert type(model[0]) is nn.Conv2d
    assert not model[0].weight.requires_grad
    assert model[4].weight.requires_grad
    fold(model, x)
    torch.testing.assert_close(model(x), wanted, **CLOSE)
    assert isinstance(model[1], nn.Identity)


def test_baking_keeps_half_types_and_the_parameter():
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    raw = layer.weight
    fold(apply_recipe(layer, "none+e").model)
    assert layer.weight is raw
    assert layer.weight.dtype == torch.bfloat16


TORCHS = {
    "weight norm": torchs.weight_norm,
    "spectral norm": torchs.spectral_norm,
    "orthogonal": torchs.orthogonal,
    "ours": weight_norm,
    "ours over torch's": lambda layer: weight_conditioning(torchs.weight_norm(layer)),
}


@pytest.mark.parametrize("put", TORCHS.values(), ids=TORCHS)
def test_folding_a_copy_leaves_the_original(put):
    # Copies of torch's parametrized layers share a class.
    model, x = nn.Sequential(put(nn.Linear(4, 4))).eval(), torch.randn(2, 4)
    twin, wanted = deepcopy(model), model(x)
    fold(twin)
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(twin(x), wanted)
    fold(model)
    for one in (model, twin):
        again = pickle.loads(pickle.dumps(one))
        torch.testing.assert_close(again(x), wanted)
        assert type(again[0]) is nn.Linear


def test_putting_a_method_on_a_copy_leaves_the_original():
    model, x = torchs.spectral_norm(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    twin, wanted = deepcopy(model), model(x)
    weight_conditioning(twin)
    parametrize.register_parametrization(twin, "bias", nn.Tanh())
    torch.testing.assert_close(model(x), wanted)
    twin(x)


def tied() -> Any:
    model = wired(lambda self, x: self.head(self.words(x)), words=nn.Embedding(9, 4), head=nn.Linear(4, 9, bias=False))
    model.head.weight = model.words.weight
    return model


def test_tied_weights_are_not_untied():
    model, tokens = tied(), torch.tensor([[1, 5]])
    apply_recipe(model, "keep+e")
    assert model.head.parametrizations.weight.original is model.words.weight
    with pytest.raises(SurgeryError, match=r"head: its raw weight is tied to that of words.*untie"):
        fold(model)
    assert parametrize.is_parametrized(model.head)
    apply_recipe(model := tied(), "keep+e@re:.")  # parametrized alike they stay tied
    wanted = model(tokens)
    fold(model)
    assert model.head.weight is model.words.weight
    torch.testing.assert_close(model(tokens), wanted)


def test_without_an_example_batch_norms_are_named_as_passed_over() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), BatchNorm(8), nn.LayerNorm(4)).eval()
    passed = fold(model).passed_over
    assert [each.reason for each in passed] == ["a norm is folded only with an example="] * 3
