"""Norms go into their neighbours, and layer normalizations lose their centring, where all that reads them allows it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import foreign_norms
import normkit as nk
from foreign_norms import BatchNormAct, ChannelsNorm, Conv1D, LlamaRMSNorm, ScaledStandardizing, Standardizing, lived_in
from normkit import BatchNorm, convert, fold
from normkit.surgery.norms import is_norm


class Gain(nn.Module):
    """A norm that several linear layers read, as attention does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.q, self.k = norm, nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.q(y) * self.k(y)


class SamePadding(Standardizing):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


class PlainRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


IMAGES, TOKENS = (2, 3, 6, 6), (2, 5, 6)
FROZEN = convert(nn.Sequential(nn.BatchNorm2d(4)), "frozen_bn").model[0]
CIRCULAR = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect", groups=3)
# What stands there, what it reads, what remains of the norm, and why it is left.
WAYS = {
    "norm and activation": ([nn.Conv2d(3, 4, 3), BatchNormAct(4, nn.Hardswish())], IMAGES, nn.Hardswish, ""),
    "ours with an activation": ([nn.Conv2d(3, 4, 3), BatchNorm(4, activation="gelu")], IMAGES, nn.GELU, ""),
    "a gain and dropout": ([Gain(nk.LayerNorm(6, bias=False, dropout=0.5))], TOKENS, nk.LayerNorm, ""),
    "the same over positions": ([nk.RMSNorm(3, over="c *", dropout=0.5), nn.Conv2d(3, 4, 2)], IMAGES, nk.RMSNorm, ""),
    "a bias and dropout": ([Gain(nk.LayerNorm(6, dropout=0.5))], TOKENS, nk.LayerNorm, "would not drop its bias"),
    "frozen": ([nn.Conv2d(3, 4, 3), FROZEN], IMAGES, nn.Identity, ""),
    "before a convolution": ([nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)], IMAGES, nn.Identity, ""),
    "before groups": ([nn.ReLU(), nn.BatchNorm2d(3), CIRCULAR], IMAGES, nn.Identity, ""),
    "before zeros": ([nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)], IMAGES, nn.BatchNorm2d, "pads with zeros"),
    "before a linear layer": ([nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False)], (5, 6), nn.Identity, ""),
    "group norm": ([nn.GroupNorm(3, 3), nn.Conv2d(3, 4, 3)], IMAGES, nn.GroupNorm, ""),
    "instance norm": ([nn.InstanceNorm2d(3, affine=True), CIRCULAR], IMAGES, nn.GroupNorm, ""),
    "layer norm over positions": ([nk.LayerNorm(3, over="c *"), nn.Conv2d(3, 4, 2, 2)], IMAGES, nn.GroupNorm, ""),
    "layer norm over channels": ([ChannelsNorm(3), nn.Conv2d(3, 4, 2, 2)], IMAGES, nk.LayerNorm, ""),
    "gain before zeros": ([nk.RMSNorm(3, over="c"), nn.Conv2d(3, 4, 3, padding=1)], IMAGES, nk.RMSNorm, ""),
    "bias before zeros": ([nn.GroupNorm(3, 3), nn.Conv2d(3, 4, 3, padding=1)], IMAGES, nn.GroupNorm, "pads with zeros"),
    "GPT-2's linear layer": ([nn.LayerNorm(6), Conv1D(4, 6)], TOKENS, nn.LayerNorm, ""),
    "layer norm": ([Gain(nn.LayerNorm(6))], TOKENS, nn.LayerNorm, ""),
    "rms norm": ([Gain(nn.RMSNorm(6, eps=1e-5))], TOKENS, nn.RMSNorm, ""),
    "1 + weight": ([Gain(PlainRMSNorm(6))], TOKENS, nn.RMSNorm, ""),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_a_norm_goes_into_its_neighbours(way: str, dtype: torch.dtype) -> None:
    layers, shape, left, reason = WAYS[way]
    model, x = lived_in(nn.Sequential(*deepcopy(layers))).to(dtype), torch.randn(shape, dtype=dtype)
    name, norm = next((n, m) for n, m in model.named_modules() if is_norm(m))
    wanted, changes = model(x), fold(model, x)
    after = model.get_submodule(name)
    assert type(after) is left
    assert getattr(norm, "dropout", 0.0) == getattr(after, "dropout", getattr(after, "p", 0.0))
    if reason:
        assert reason in changes.passed_over[0].reason
        assert after is norm
        return
    assert (changes.rows[0].error or 0.0) < (1e-5 if dtype == torch.float32 else 1e-13)
    assert not changes.passed_over
    assert not any(True for _ in (*after.parameters(), *after.buffers()))
    other = torch.randn(shape, dtype=dtype)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    folded = model(other)
    changes.undo()
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(model(other), folded, rtol=1e-5, atol=1e-5)


def test_gains_stay_where_a_reader_is_tied_or_no_layer() -> None:
    tied = lived_in(Gain(nn.LayerNorm(6)))
    tied.k.weight = tied.q.weight
    assert "read elsewhere" in fold(tied, torch.randn(TOKENS).double()).passed_over[0].reason
    for first, readers in ((False, ["TransformerEncoderLayer", "the caller"]), (True, ["MultiheadAttention"])):
        layer = lived_in(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=first))
        changes = fold(layer, torch.randn(TOKENS).double())
        assert [left.reason.split(",")[0][22:] for left in changes.passed_over] == readers
        assert [row.layer for row in changes] == ["norm2"] * first


# torch calls its older weight norm deprecated.
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("put", [nn.utils.weight_norm, nn.utils.spectral_norm, Standardizing, ScaledStandardizing])
def test_weights_that_are_made_in_other_ways_become_plain(put) -> None:
    first = put(3, 4, 3) if isinstance(put, type) else put(nn.Conv2d(3, 4, 3))
    model, x = lived_in(nn.Sequential(first, nn.BatchNorm2d(4))), torch.randn(IMAGES).double()
    wanted, changes = model(x), fold(model, x)
    assert len(changes.rows) == 2
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[1], nn.Identity)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    assert "SAME padding" in fold(lived_in(nn.Sequential(SamePadding(3, 4, 3))), x).passed_over[0].reason
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), wanted, rtol=1e-10, atol=1e-10)


# torch says that an even kernel may take a padded copy.
@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("padding", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same"}], ids=str)
def test_what_torch_pads_is_folded(padding: dict[str, Any]) -> None:
    changes = fold(lived_in(nn.Sequential(Standardizing(3, 4, (2, 3), **padding))), torch.randn(2, 3, 8, 8).double())
    assert [row.after for row in changes] == ["Conv2d"]
    unbatched = fold(lived_in(nn.Sequential(Standardizing(3, 4, 3, padding=1))), torch.randn(3, 8, 8).double())
    assert [row.after for row in unbatched] == ["Conv2d"]


def shortcut() -> nn.Module:
    """The block of many a ResNet: an empty Sequential is its identity."""
    parts = {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), "shortcut": nn.Sequential()}
    return foreign_norms.wired(lambda self, x: (self.bn(self.conv(x)) + self.shortcut(x)).relu(), **parts)


def test_an_empty_sequential_stays_an_identity() -> None:
    x = torch.randn(2, 3, 6, 6).double()
    assert len(nk.surgery.drop_redundant_bias(lived_in(shortcut()), x).rows) == 1
    assert len(fold(lived_in(shortcut()), x).rows) == 1


class Parts(nn.Module):
    """A convolutional part and a linear one that are folded, the latter with its centring, and norms that are accelerated."""

    def __init__(self) -> None:
        super().__init__()
        folded = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.images = nn.Sequential(*folded, nn.ReLU(), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1))
        self.lead, self.norm = nn.Linear(6, 6), Gain(nn.LayerNorm(6))
        self.last = nn.Sequential(nn.LayerNorm(6), nn.ReLU(), nn.RMSNorm(6), nn.ReLU(), LlamaRMSNorm(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lead(self.images(x).flatten(2).transpose(1, 2))
        return self.last(self.norm(y).relu())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's exporter
def test_folded_and_accelerated_models_export_to_onnx() -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="torch.onnx.export writes with it")
    runtime = pytest.importorskip("onnxruntime", reason="it runs what was exported")
    model, x = lived_in(Parts()).float(), torch.randn(IMAGES)
    wanted = model(x)
    after = [row.after.partition("(")[0] for row in fold(model, x, centring=True)]
    assert after == ["Identity", "GroupNorm", "LayerNorm", "RMSNorm"]
    assert len(nk.accelerate(model, where="re:last").rows) == 3
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Sums in another order, through eight layers in float32.
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted, rtol=1e-4, atol=1e-5)


# Layer normalizations become RMS normalizations where what they read can lose its mean in the layers that write it


class Transformer(nn.Module):
    """Words, positions and a class token, changed by something, then blocks that normalize first, and a head."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor] = lambda model, x: x, bias: bool = False) -> None:
        super().__init__()
        self.change, self.words, self.token = change, nn.Embedding(12, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.positions, self.scale = nn.Parameter(torch.randn(1, 7, 8)), nn.Parameter(torch.randn(8))
        self.register_buffer("waves", torch.randn(9, 8), persistent=False)
        blocks = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(8, bias=bias), nn.Linear(8, 12)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.token.expand(tokens.shape[0], -1, -1), 3 * self.words(tokens)], 1)
        x = first = self.change(self, x + self.positions + self.waves[: x.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0]), first if self.change is shown else x.new_zeros(1)


class Images(nn.Module):
    """Patches by a convolution, moved to the last axis, and summed up in place."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(4, 8, 2, 2, groups=groups), nn.LayerNorm(8)
        self.mix, self.last, self.head = nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x += self.mix(self.norm(x))
        return self.head(self.last(x / 2))


def shown(model: Any, x: Tensor) -> Tensor:
    return x * 1.0


def tied() -> nn.Module:
    model = Transformer()
    model.head.weight = model.words.weight
    return model


def hooked() -> nn.Module:
    model = Transformer()
    model.blocks[0].linear2.register_forward_hook(lambda layer, args, y: None)
    return model


def dropping() -> nn.Module:
    model = Images()
    model.norm = nk.LayerNorm(8, dropout=0.5)
    return model


TOKENS_centring, IMAGES_centring = torch.arange(12).view(2, 6), torch.randn(2, 4, 6, 6)
# What is folded, what it reads, how many norms become RMS normalizations, and why the others don't.
CASES = {
    "transformer": (Transformer, TOKENS_centring, 5, ""),
    "a bias that stays": (lambda: Transformer(bias=True), TOKENS_centring, 5, ""),
    "images": (Images, IMAGES_centring, 2, ""),
    "dropout": (dropping, IMAGES_centring, 2, ""),
    "grouped": (lambda: Images(2), IMAGES_centring, 0, "written by another operation (convolution)"),
    "a gain": (lambda: Transformer(lambda model, x: x * model.scale), TOKENS_centring, 0, "by another operation (mul)"),
    "a function": (lambda: Transformer(lambda model, x: x.tanh()), TOKENS_centring, 0, "another operation (tanh)"),
    "a reader": (lambda: Transformer(lambda model, x: x + model.head(x).mean()), TOKENS_centring, 0, "other operation"),
    "an output": (lambda: Transformer(shown), TOKENS_centring, 0, "is an output of the model"),
    "a tied head": (tied, TOKENS_centring, 0, "read by another operation (addmm)"),
    "a hook": (hooked, TOKENS_centring, 0, "has hooks"),
    "a norm": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0), torch.randn(2, 3, 8), 0, "no linear layer"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_layer_norms_become_rms_norms_where_their_stream_can_be_centred(case: str, dtype: torch.dtype) -> None:
    make, x, count, reason = CASES[case]
    model = make().to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = x.to(dtype) if x.is_floating_point() else x
    wanted, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    changes = nk.fold(model, x, centring=True)
    made = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    assert len(made) == count == sum("centring" in row.note for row in changes)
    assert [getattr(norm, "dropout", 0.0) for norm in made if case == "dropout"] in ([], [0.5, 0.0])
    if reason:
        assert any(reason in left.reason for left in changes.passed_over)
    # The promise of every fold; float64 rounds 1e9 times finer.
    assert all((row.error or 0.0) < (1e-5 if dtype == torch.float32 else 1e-13) for row in changes)
    other = x.roll(1, 1)
    given = model(other)
    changes.undo()
    assert_close(model(other), given, rtol=1e-4, atol=1e-4)  # float32 through two blocks, not on the example
    assert_close(model(x), wanted, rtol=0, atol=0)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
