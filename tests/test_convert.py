from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreign_norms import LlamaRMSNorm, random_, wired
from normkit.activations.batch_channel_norm import BatchChannelNorm
from normkit.activations.batch_norm import BatchNorm
from normkit.activations.ghost_batch_norm import GhostBatchNorm
from normkit.activations.global_response_norm import GlobalResponseNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm
from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.activations.sync_batch_norm import SyncBatchNorm
from normkit.core.errors import SurgeryError
from normkit.surgery.accelerate import accelerate
from normkit.surgery.condition import condition
from normkit.surgery.convert import convert
from normkit.surgery.recipe import apply_recipe

ENCODER = partial(nn.TransformerEncoderLayer, 8, 2, batch_first=True)
FIRST, LAST = (3, 8, 5), (3, 5, 8)


SOURCES = {
    "BatchNorm1d": (nn.BatchNorm1d(8, eps=1e-3, momentum=0.3), FIRST),
    "SyncBatchNorm": (nn.SyncBatchNorm(8), FIRST),
    "GroupNorm": (nn.GroupNorm(2, 8), FIRST),
    "InstanceNorm1d": (nn.InstanceNorm1d(8, affine=True), FIRST),
    "LayerNorm": (nn.LayerNorm(8), LAST),
    "RMSNorm": (nn.RMSNorm(8), LAST),
    "ours BatchNorm": (BatchNorm(8, layout="n * c"), LAST),
    "ours LayerNorm over c": (LayerNorm(8, over="c"), FIRST),
    "ours RMSNorm over c *": (RMSNorm(8, over="c *"), FIRST),
    "ours RMSNorm with bias": (RMSNorm(8, eps=1e-6, bias=True), LAST),
}
TARGETS = {"bn": BatchNorm, "gn:4": GroupNorm, "ln": LayerNorm, "in": InstanceNorm, "rms": RMSNorm, "none": nn.Identity}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_norm_converts_to_every_other_with_its_parameters(source, to):
    norm, shape = SOURCES[source]
    model = nn.Sequential(random_(deepcopy(norm))).double()
    old, x = model[0], torch.randn(shape, dtype=torch.float64)
    changes = convert(model, to)
    new = model[0]
    assert model(x).shape == x.shape
    if not len(changes):
        assert new is old
        return
    assert type(new) is TARGETS[to]
    if to != "none":
        assert new.weight is old.weight
        assert new.eps == (torch.finfo(torch.float64).eps if old.eps is None else old.eps)
        assert all(tensor.dtype == torch.float64 for tensor in new.state_dict().values() if tensor.is_floating_point())
    if to not in ("rms", "none"):
        if isinstance(old, nn.RMSNorm) and getattr(old, "bias", None) is None:
            torch.testing.assert_close(new.bias, torch.zeros(8, dtype=torch.float64))
            assert "bias created" in changes.rows[0].note
        else:
            assert new.bias is old.bias
    elif to == "rms" and getattr(old, "bias", None) is not None:
        assert "bias dropped" in changes.rows[0].note


@pytest.mark.parametrize(
    ("source", "to", "shape"),
    [
        (nn.GroupNorm(1, 8), "ln", (3, 8, 5, 5)),
        (LayerNorm(8, over="c *"), "gn:1", (3, 8, 5, 5)),
        (nn.InstanceNorm2d(8, affine=True), "gn:8", (3, 8, 5, 5)),
        (nn.GroupNorm(8, 8), "in", (3, 8, 5, 5)),
        (nn.LayerNorm(8), "gn:1", (3, 8)),  # one sample has no other axis
        (nn.BatchNorm2d(8), "in", (1, 8, 5, 5)),  # of a single sample
        (nn.InstanceNorm1d(8), "bn", (1, 8, 5)),
    ],
)
def test_conversions_that_are_identities_keep_the_function(source, to, shape):
    model, x = nn.Sequential(random_(deepcopy(source))).double(), torch.randn(shape, dtype=torch.float64)
    wanted = model(x)
    assert len(convert(model, to)) == 1
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_a_norm_that_is_one_already_is_left():
    model = nn.Sequential(nn.BatchNorm2d(4), BatchNorm(4))
    kept = list(model)
    assert len(convert(model, "bn")) == 0
    assert list(model) == kept
    assert len(convert(nn.Sequential(nn.GroupNorm(2, 4)), "gn:4")) == 1
    assert len(convert(nn.Sequential(nn.GroupNorm(2, 6)), "gn:gcd4")) == 0
    assert len(convert(nn.Sequential(nn.LayerNorm(4)), "ln:c")) == 0


@pytest.mark.parametrize("method", [LayerNorm, RMSNorm])
def test_a_norm_of_each_position_stays_one_unless_asked(method):
    word = {LayerNorm: "ln", RMSNorm: "rms"}
    other = RMSNorm if method is LayerNorm else LayerNorm
    for over in ("c", "c *"):
        assert len(convert(nn.Sequential(method(4, over=over)), word[method])) == 0
        changed = convert(nn.Sequential(method(4, over=over)), word[other]).model[0]
        assert (type(changed), changed.over) == (other, over)
        for asked in ("c", "c *"):
            changed = convert(nn.Sequential(method(4, over=over)), f"{word[method]}:{asked}").model[0]
            assert changed.over == asked
    assert convert(nn.Sequential(nn.BatchNorm2d(4)), word[method]).model[0].over == "c *"


def test_synchronized_and_plain_batch_normalization_become_each_other():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.randn(5, 3, 2, 2))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for to, wanted in (("sync", SyncBatchNorm), ("bn", BatchNorm), ("sync", SyncBatchNorm)):
        assert convert(model, to).rows[0].note == ""
        assert type(model[1]) is wanted
        torch.testing.assert_close(dict(model.state_dict()), state)
    model[1] = nn.SyncBatchNorm(4)
    assert len(convert(model, "sync")) == 0
    assert len(convert(model, "bn")) == 1


def test_a_norm_of_another_rule_is_not_the_plain_one():
    model, x = nn.Sequential(GhostBatchNorm(4, 2), GlobalResponseNorm(4, layout="n c *")), torch.randn(4, 4, 3, 3)
    wanted = model(x)
    inference = model.eval()(x)
    assert [row.layer for row in convert(model, "bn")] == ["0"]  # response normalization stands beside norms
    assert type(model[0]) is BatchNorm
    torch.testing.assert_close(model(x), inference)  # running statistics mean the same in both
    assert not torch.allclose(model.train()(x), wanted)


@pytest.mark.parametrize("method", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("to", ["ln:c", "rms:c", "bn", "none", "ghost"])
def test_what_a_norm_does_behind_itself_goes_over(method, to):
    norm = method(8, over="c", dropout=0.3, activation="leaky_relu", save="output")
    if to in ("bn", "ghost"):
        for norm.activation in ("leaky_relu", None) if to == "ghost" else (None,):
            refused = rf"it applies {norm.activation or 'dropout=0.3'} too, which {to}[:16]* has no"
            with pytest.raises(SurgeryError, match=refused):
                convert(nn.Sequential(norm), to)
        norm.dropout = 0.0
        note = convert(nn.Sequential(norm), to).rows[0].note
        assert ("keeps its input" in note) == (to == "ghost")
        return
    made = convert(nn.Sequential(norm), to).model[0]
    if to == "none":
        assert (repr(made[0]), made[1].p) == ("LeakyReLU(negative_slope=0.01)", 0.3)
    else:
        assert (made.activation, made.dropout, made.save) == ("leaky_relu", 0.3, "output")


@pytest.mark.parametrize("to", ["bn", "gn:2"])
def test_parameters_without_a_place_are_told(to):
    note = convert(nn.Sequential(BatchChannelNorm(4, 2)), to).rows[0].note
    assert "group_weight, group_bias dropped" in note


def test_flags_and_hooks_are_kept():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    model[0].eval()
    calls = []
    handle = model[0].register_forward_hook(lambda module, args, output: calls.append("after"))
    model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda module, inputs, outputs: calls.append("backward"))
    convert(model, "gn:2")
    assert not model[0].training
    assert not model[0].weight.requires_grad
    model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]
    handle.remove()
    model(torch.randn(3, 4))
    assert calls == ["before", "after", "backward", "before"]


class Marked(nn.LayerNorm):
    def __init__(self, size):
        super().__init__(size)
        self.features = size


@pytest.mark.parametrize("change", [lambda model: convert(model, "gn:2"), accelerate], ids=["convert", "accelerate"])
def test_attributes_of_the_user_are_kept(change):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), Marked(4))
    for layer in model:
        layer.qconfig, layer.again = object(), layer.forward
    kept = list(model)
    change(model)
    changed = [(new, old) for new, old in zip(model, kept, strict=True) if new is not old]
    assert len(changed) >= 2
    for new, old in changed:
        assert new.qconfig is old.qconfig
        assert not {"again", "features"} & vars(new).keys()
    model(torch.randn(3, 4))


def test_a_norm_in_two_places_stays_one():
    norm = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    assert len(convert(model, "ln")) == 1
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], LayerNorm)


def test_without_parameters_there_is_nothing_to_carry():
    model = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm2d(4)).double()
    convert(model, "bn")
    assert model[1].weight is None
    assert (model[1].running_mean.dtype, model[1].momentum) == (torch.float64, 0.1)


def test_a_scalar_weight_is_spread():
    model, x = nn.Sequential(random_(LayerNorm(4, over="c *", per=""))), torch.randn(2, 4, 3)
    wanted = model(x)
    changes = convert(model, "gn:1")
    assert "spread over channels" in changes.rows[0].note
    torch.testing.assert_close(model(x), wanted)


def test_source_and_where_choose():
    def model() -> nn.Module:
        return nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.LayerNorm(4), "c": nn.BatchNorm2d(4)})

    assert [row.layer for row in convert(model(), "rms", source="batch_norm")] == ["a", "c"]
    assert [row.layer for row in convert(model(), "rms", where="first_last")] == ["a", "c"]
    assert [row.layer for row in convert(model(), "rms", where="re:b")] == ["b"]
    assert [row.layer for row in convert(model(), "rms", where=lambda name, module: name == "c")] == ["c"]


def test_several_axes_go_where_they_can():
    model = nn.Sequential(random_(nn.LayerNorm((4, 5))))
    convert(model, "rms")
    assert tuple(model[0].weight.shape) == (4, 5)
    assert len(convert(model, "ln")) == 1
    assert tuple(model[0].normalized_shape) == (4, 5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("to", ["rms", "bn", "gn:2", "none", "keep"])
def test_the_fused_encoder_follows_the_conversion(to, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first, norm=nn.LayerNorm(8))
    model = random_(model).double()
    if to != "keep":
        convert(model, to)
    apply_recipe(model, "keep+wn+e@all")  # weights too: the fused kernel must read effective ones
    model.eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.arange(5)[None] >= torch.tensor([[5], [3], [4]])
    for mask in (None, padding):
        slow = model(x, src_key_padding_mask=mask)
        with torch.no_grad():
            fused = deepcopy(model)(x, src_key_padding_mask=mask)
        if mask is None:
            torch.testing.assert_close(fused, slow.detach())
        else:  # nested tensors, where they are kept, fill the padding with zeros
            torch.testing.assert_close(fused[~padding], slow.detach()[~padding])


def test_time_first_transformers_are_refused_what_reads_samples():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False, norm=nn.LayerNorm(8))
    with pytest.raises(SurgeryError, match=r"layers\.0\.norm1: gn:2 normalizes each sample.*batch_first=True"):
        convert(model, "gn:2", where="re:layers")
    with pytest.raises(SurgeryError, match=r"^norm: in normalizes"):
        convert(model, "in", where="re:^norm$")
    assert len(convert(model, "rms")) == 3


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), LlamaRMSNorm(8)])
@pytest.mark.parametrize("to", ["keep", "ln", "rms", "none", "gn:4", "in", "bn"])
def test_a_change_through_which_tokens_see_later_ones_says_so(norm, to):
    causal = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    causal.norm1, causal.norm2 = deepcopy(norm), deepcopy(norm)
    mask, x = nn.Transformer.generate_square_subsequent_mask(12), torch.randn(2, 12, 8)
    later = torch.cat([x[:, :8], torch.randn(2, 4, 8)], 1)
    rows = apply_recipe(causal, to).rows
    leaks = not torch.allclose(causal(x, mask)[:, :8], causal(later, mask)[:, :8], atol=1e-4)
    assert leaks == (to in ("gn:4", "in", "bn"))
    assert all(("statistics over positions: in a causal model" in row.note) == leaks for row in rows)


@pytest.mark.parametrize(
    ("norm", "to", "told"),
    [
        (LayerNorm(8, over="c"), "gn:4", True), (LayerNorm(8, over="c"), "ln:c *", True),
        (LayerNorm(8, over="c"), "rms", False), (LayerNorm(8, over="c"), "rms:c", False),
        (LayerNorm(8, over="c *"), "gn:4", False), (nn.LayerNorm((4, 8)), "rms", False),
        (nn.GroupNorm(2, 8), "bn", False), (nn.BatchNorm2d(8), "ln", False),
    ],
)  # fmt: skip
def test_only_norms_of_each_position_can_begin_to_leak(norm, to, told):
    model = nn.Sequential(nn.Conv1d(8, 8, 1), norm)  # which may be causal
    assert ("over positions" in convert(model, to).rows[0].note) == told


@pytest.mark.parametrize(
    ("model", "example", "told"),
    [
        (nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8)), None, False),
        (nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8)), torch.randn(5, 10), False),
        (nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8)), torch.randn(5, 7, 10), True),  # tokens, whoever mixes them
        (nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8)), None, True),
        (nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8)), torch.tensor([[1, 2], [3, 4]]), True),
        (nn.Sequential(nn.Conv2d(3, 8, 3), LayerNorm(8, over="c")), None, False),
        (nn.Sequential(nn.Conv2d(3, 8, 3), LayerNorm(8, over="c")), torch.randn(2, 3, 6, 6), False),
        (nn.Sequential(nn.Conv1d(3, 8, 3), LayerNorm(8, over="c")), torch.randn(2, 3, 6), True),
        (ENCODER(), torch.randn(2, 6, 8), True),
        (nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(1), ENCODER()), None, False),
    ],
)
def test_only_what_may_be_causal_is_warned(model, example, told):
    rows = convert(deepcopy(model), "gn:2", example=example).rows
    assert all(("over positions" in row.note) == told for row in rows)
    assert rows


def test_a_time_first_transformer_that_is_left_is_told():
    model = nn.TransformerEncoderLayer(8, 2)
    left = convert(model, "gn:2", on_refusal="leave").passed_over
    assert [passed.reason[:31] for passed in left] == ["gn:2 normalizes each sample, an"] * 2


def around(self: Any, x: Tensor) -> Tensor:
    """Uses the weight of one norm in a function, and another from a plain list."""
    return self.copies[0](nn.functional.layer_norm(self.called(x), (4,), self.read.weight))


def test_a_change_without_effect_is_refused():
    (called, read, listed), x = [nn.LayerNorm(4) for _ in range(3)], torch.randn(3, 4)
    model = wired(around, called=called, read=read, copies=[listed], listed=listed)
    with pytest.raises(SurgeryError, match=r"read: it is not called on the example.*on_refusal='leave'"):
        convert(model, "rms", example=x)
    changes = convert(model, "rms", example=x, on_refusal="leave")
    assert [row.layer for row in changes] == ["called"]
    left = {passed.layer: passed.reason for passed in changes.passed_over}
    assert "no effect" in left["read"]
    assert "no effect" in left["listed"]
    assert model.listed is model.copies[0]
    resting = wired(lambda self, x: self.used(x), used=nn.Linear(4, 4), unused=nn.Linear(4, 4))
    with pytest.raises(SurgeryError, match=r"unused: its weight is not read on the example"):
        condition(resting, where="all", example=x)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1, enable_nested_tensor=False)
    rows = convert(encoder, "rms", example=torch.randn(2, 3, 8)).rows  # torch's fused kernel would call no norm
    assert [row.note for row in rows] == ["bias dropped"] * 2
