from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from normkit.activations.batch_channel_norm import BatchChannelNorm
from normkit.activations.batch_norm import BatchNorm
from normkit.activations.ghost_batch_norm import GhostBatchNorm
from normkit.activations.global_response_norm import GlobalResponseNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm
from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.activations.sync_batch_norm import SyncBatchNorm
from normkit.core.errors import NotationError, OptionError, SurgeryError
from normkit.surgery.accelerate import accelerate
from normkit.surgery.condition import condition
from normkit.surgery.convert import convert
from normkit.surgery.recipe import apply_recipe

FIRST, LAST = (3, 8, 5), (3, 5, 8)


def random_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


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


def test_there_and_back_again():
    norm = random_(nn.GroupNorm(4, 8))
    model, x = nn.Sequential(norm), torch.randn(2, 8, 3)
    wanted = model(x)
    for to in ("bn", "in", "ln:c", "gn:4"):
        convert(model, to)
    torch.testing.assert_close(model(x), wanted)


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


def test_the_model_itself_may_be_a_norm():
    changes = convert(nn.BatchNorm1d(4), "rms")
    assert isinstance(changes.model, RMSNorm)
    assert changes.rows[0].layer == "(model)"


def test_without_parameters_there_is_nothing_to_carry():
    model = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm2d(4)).double()
    convert(model, "bn")
    assert model[1].weight is None
    assert model[1].running_mean.dtype == torch.float64
    assert model[1].momentum == 0.1


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


class LlamaLike(nn.Module):
    def __init__(self, size: int, offset: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.variance_epsilon, self.offset = eps, offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        scaled = hidden_states.float() * torch.rsqrt(
            hidden_states.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        )
        return (self.offset + self.weight) * scaled.to(hidden_states.dtype)


class GemmaLikeRMSNorm(LlamaLike):
    def __init__(self, size: int) -> None:
        super().__init__(size, offset=1.0, eps=3e-5)


class LlamaLikeRMSNorm(LlamaLike):
    pass


class LayerNorm2d(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-6) * self.weight[:, None, None] + self.bias[:, None, None]


class TimmLayerNorm2d(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("norm", "to", "back", "shape"),
    [
        (LlamaLikeRMSNorm(8), "gn:1", "rms", (3, 8)),
        (GemmaLikeRMSNorm(8), "gn:1", "rms", (3, 8)),
        (LlamaLikeRMSNorm(3), "gn:1", "rms", (3, 3)),
        (LayerNorm2d(8), "gn:8", "ln:c", (2, 8, 3, 5)),
        (TimmLayerNorm2d(8), "gn:8", "ln:c", (2, 8, 3, 5)),
    ],
)
def test_foreign_norms_are_known_by_what_they_do(norm, to, back, shape):
    # To another kind and back: what was read (gain, bias, eps, axes) is all there.
    model, x = nn.Sequential(random_(deepcopy(norm))), torch.randn(shape) * 1e-2
    state, wanted = torch.get_rng_state(), model(x)
    convert(model, to)
    convert(model, back)
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(
        torch.get_rng_state(), state, rtol=0, atol=0
    )  # probing draws nothing from the global generator


@pytest.mark.parametrize("norm", [GemmaLikeRMSNorm(8), RMSNorm(8, eps=3e-5, offset=1.0)])
@pytest.mark.parametrize("to", ["ln", "gn:2", "rms:c"])
def test_one_plus_weight_keeps_its_parameter(norm, to):
    model = nn.Sequential(random_(deepcopy(norm)))
    weight, value, checkpoint = model[0].weight, model[0].weight.detach().clone(), model.state_dict()
    x = torch.randn(3, 8)
    wanted, changes = model(x), convert(model, to)
    if changes.rows:
        assert list(model.parameters())[0 if to == "rms:c" else -1] is weight
        assert set(changes.new_parameters) <= {"0.bias"}
        torch.testing.assert_close(model[0].weight, value + (to != "rms:c"))
        assert model[0].eps == 3e-5
    model.load_state_dict(checkpoint, strict=False)  # as saved before: weight is what it was, not the gain
    torch.testing.assert_close(weight.detach(), value, rtol=0, atol=0)
    convert(model, "rms")
    torch.testing.assert_close(model(x), wanted)
    assert next(iter(model.parameters())) is weight


class GatedRMSNorm(LlamaLike):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states)


class SquaredNorm(LlamaLike):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) ** 2


class FixedScaleNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


class NormAndSine(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sin()


class NormAndHardswish(nn.BatchNorm2d):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.act = nn.Hardswish()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class DetectorsFrozenBatchNorm2d(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.3), ("running_mean", 0.2), ("running_var", 0.7)):
            self.register_buffer(name, torch.full((size,), value) + 0.1 * torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def test_frozen_batch_normalization_both_ways():
    model, x = (
        nn.Sequential(DetectorsFrozenBatchNorm2d(4), nn.BatchNorm2d(4)).double(),
        torch.randn(3, 4, 5, 5).double(),
    )
    model(x)
    wanted, keys = model.eval()(x), {"weight", "bias", "running_mean", "running_var"}
    changes = convert(model, "frozen_bn")
    assert [row.layer for row in changes] == ["1"]
    model.train()
    torch.testing.assert_close(model(x), wanted)
    assert set(model[1].state_dict()) == keys
    assert not list(model.parameters())
    model[1].load_state_dict(nn.BatchNorm2d(4).state_dict())
    model[1].load_state_dict(convert(nn.Sequential(deepcopy(model[1])), "bn").model[0].state_dict())
    wanted = model(x)
    assert [row.note for row in convert(model, "bn")] == ["", ""]
    assert len(list(model.parameters())) == 4
    torch.testing.assert_close(model.eval()(x), wanted)
    assert isinstance(convert(model, "sync_bn").model[0], SyncBatchNorm)


def replaced_forward() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda input: input  # pyright: ignore[reportAttributeAccessIssue]
    return norm


ERRORS = [
    (
        nn.BatchNorm2d(48),
        "gn:32",
        SurgeryError,
        r"0: 48 channels do not split into 32 groups; .*divide 48: 1, 2, 3, .*48",
    ),
    (nn.LayerNorm((4, 5, 5)), "bn", SurgeryError, r"0: it normalizes over the axes 4x5x5.*only ln, rms, dyt.* and none"),
    (GatedRMSNorm(4), "ln", SurgeryError, r"0 \(GatedRMSNorm\).*takes hidden_states, gate"),
    (SquaredNorm(4), "ln", SurgeryError, r"0 \(SquaredNorm\).*fits neither"),
    (FixedScaleNorm2d(), "ln", SurgeryError, r"0 \(FixedScaleNorm2d\).*parameters \(none\)"),
    (NormAndSine(4), "ln", SurgeryError, r"0 \(NormAndSine\).*it is not BatchNorm2d, with or without an act"),
    (NormAndHardswish(4), "ln", SurgeryError, r"0: it applies Hardswish\(\) too, which ln has no place for"),
    (nn.BatchNorm2d(4, track_running_stats=False), "frozen_bn", SurgeryError, r"0: frozen_bn is made of a batch norm"),
    (replaced_forward(), "ln", SurgeryError, r"forward was replaced on the object"),
    (nn.LazyBatchNorm2d(), "ln", SurgeryError, r"no size yet"),
    (nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), "ln", SurgeryError, r"parametrized.*fold"),
    (nn.Linear(2, 2), "bn", SurgeryError, r"no activation norm"),
    (
        nn.BatchNorm2d(4),
        "bm",
        NotationError,
        r"'bm' is not known; did you mean 'bn'\?; norms that exist: none, .*gn:GROUPS",
    ),
    (nn.BatchNorm2d(4), "gn:two", NotationError, r"got GROUPS 'two', wanted a whole number from 1"),
    (nn.BatchNorm2d(4), "gn:0", NotationError, r"got GROUPS '0'"),
    (nn.BatchNorm2d(4), nn.LayerNorm, NotationError, r"LayerNorm'> is no word; wanted one of none, bn.*e\.g\. 'ln'"),
    (nn.BatchNorm2d(4), "ln:d", NotationError, r"got AXES 'd', wanted c or c \*$"),
    (nn.BatchNorm2d(4), "bn:2", NotationError, r"takes no option"),
]


@pytest.mark.parametrize(("norm", "to", "error", "message"), ERRORS)
def test_errors_name_the_layer_and_the_reason(norm, to, error, message):
    model = nn.Sequential(norm, nn.Linear(2, 2))
    with pytest.raises(error, match=message):
        convert(model, to)
    assert model[0] is norm


def test_several_axes_go_where_they_can():
    model = nn.Sequential(random_(nn.LayerNorm((4, 5))))
    convert(model, "rms")
    assert tuple(model[0].weight.shape) == (4, 5)
    assert len(convert(model, "ln")) == 1
    assert tuple(model[0].normalized_shape) == (4, 5)


def test_an_example_finds_a_norm_that_cannot_take_its_input():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(SurgeryError, match=r"does not run on the example.*InstanceNorm"):
        convert(model, "in", example=torch.randn(2, 4))
    assert type(model[1]) is nn.LayerNorm
    assert model.training
    convert(model, "in", example=(torch.randn(2, 3, 4),))


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


def test_copies_and_state_dicts():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    convert(model, "gn:2")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    other = deepcopy(model)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), LlamaLikeRMSNorm(8)])
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
        (LayerNorm(8, over="c"), "gn:4", True),
        (LayerNorm(8, over="c"), "ln:c *", True),
        (LayerNorm(8, over="c"), "rms", False),
        (LayerNorm(8, over="c"), "rms:c", False),
        (LayerNorm(8, over="c *"), "gn:4", False),
        (nn.LayerNorm((4, 8)), "rms", False),
        (nn.GroupNorm(2, 8), "bn", False),
        (nn.BatchNorm2d(8), "ln", False),
    ],
)
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
        (nn.TransformerEncoderLayer(8, 2, batch_first=True), torch.randn(2, 6, 8), True),
        (
            nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(1), nn.TransformerEncoderLayer(8, 2, batch_first=True)),
            None,
            False,
        ),
    ],
)
def test_only_what_may_be_causal_is_warned(model, example, told):
    rows = convert(deepcopy(model), "gn:2", example=example).rows
    assert all(("over positions" in row.note) == told for row in rows)
    assert rows


class OlmoLikeLayerNorm(nn.Module):
    """Layer normalization without parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.normalized_shape = (size,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden_states.float(), self.normalized_shape, eps=1e-5).to(hidden_states.dtype)


class SizelessRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class UnitNorm(nn.Module):
    """No activation norm: it divides by the length."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


def test_norms_without_parameters_are_norms():
    model, x = nn.Sequential(nn.Linear(8, 8), OlmoLikeLayerNorm(8), UnitNorm()), torch.randn(3, 8)
    wanted = model(x)
    for to in ("gn:1", "ln"):  # of one sample without positions the same
        assert [row.layer for row in convert(model, to)] == ["1"]
        torch.testing.assert_close(model(x), wanted)
        assert not list(model[1].parameters())
    assert convert(model, "rms").rows[0].note == ""
    assert type(model[2]) is UnitNorm


def test_an_example_tells_the_size_of_a_norm():
    model, x = nn.Sequential(nn.Linear(8, 6), SizelessRMSNorm()), torch.randn(3, 8)
    with pytest.raises(SurgeryError, match=r"1: its number of features is not known; give example="):
        convert(model, "ln")
    assert len(convert(model, "rms")) == 0
    convert(model, "ln", example=x)
    assert tuple(model[1].normalized_shape) == (6,)
    torch.testing.assert_close(model(x), nn.functional.layer_norm(model[0](x), (6,), eps=1e-6))


def test_of_features_alone_both_layouts_are_one():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), torch.randn(3, 4)
    with pytest.raises(SurgeryError, match=r"1: scale reads features on the last axis.*has channels on axis 1"):
        convert(model, "scale")
    assert len(convert(model, "scale", example=x)) == 1
    assert len(convert(model, "pono", example=x)) == 1
    assert len(convert(model, "bn", example=x)) == 1


def test_what_is_refused_can_be_left():
    def model() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(48), SquaredNorm(4), nn.LayerNorm((4, 5)), nn.BatchNorm2d(64))

    whole = model()
    changes = convert(whole, "gn", on_refusal="leave")
    assert [str(row) for row in changes] == ["3: BatchNorm2d(64) -> GroupNorm(32, 64) (running statistics dropped)"]
    left = {passed.layer: passed.reason for passed in changes.passed_over}
    for name, reason in (("0", "48 channels do not split"), ("1", "fits neither"), ("2", "over the axes 4x5")):
        assert reason in left[name]
    assert [type(module) for module in whole] == [nn.BatchNorm2d, SquaredNorm, nn.LayerNorm, GroupNorm]
    rows = convert(model(), "gn:gcd32", on_refusal="leave").rows
    assert [row.after for row in rows] == ["GroupNorm(16, 48)", "GroupNorm(32, 64)"]
    with pytest.raises(SurgeryError, match=r"48 channels.*gcd32 for the greatest common divisor.*on_refusal='leave'"):
        convert(model(), "gn")
    with pytest.raises(OptionError, match=r"on_refusal='skip'; wanted 'raise' or 'leave'"):
        convert(model(), "gn", on_refusal="skip")


def test_a_time_first_transformer_that_is_left_is_told():
    model = nn.TransformerEncoderLayer(8, 2)
    left = convert(model, "gn:2", on_refusal="leave").passed_over
    assert [passed.reason[:31] for passed in left] == ["gn:2 normalizes each sample, an"] * 2


class HasUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class CallsAroundIts(nn.Module):
    """Uses the weight of one norm in a function, and another from a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, listed = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.copies, self.listed = [listed], listed

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(self.called(x), (4,), self.read.weight)
        return self.copies[0](x)


def test_a_change_without_effect_is_refused():
    model, x = CallsAroundIts(), torch.randn(3, 4)
    with pytest.raises(SurgeryError, match=r"read: it is not called on the example.*on_refusal='leave'"):
        convert(model, "rms", example=x)
    changes = convert(model, "rms", example=x, on_refusal="leave")
    assert [row.layer for row in changes] == ["called"]
    left = {passed.layer: passed.reason for passed in changes.passed_over}
    assert "no effect" in left["read"]
    assert "no effect" in left["listed"]
    assert model.listed is model.copies[0]
    with pytest.raises(SurgeryError, match=r"unused: its weight is not read on the example"):
        condition(HasUnused(), where="all", example=x)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1, enable_nested_tensor=False)
    rows = convert(encoder, "rms", example=torch.randn(2, 3, 8)).rows  # torch's fused kernel would call no norm
    assert [row.note for row in rows] == ["bias dropped"] * 2


def trained_batch_norms() -> nn.Sequential:
    body = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()
    for layer in body[1::3]:
        nn.init.normal_(layer.weight, 1.0, 0.3)
        nn.init.normal_(layer.bias)
    for _ in range(30):
        model(torch.randn(16, 3, 6, 6).double() + 1)
    return model.eval()


@pytest.mark.parametrize("to", ["gn:4", "ln", "in"])
def test_calibration_fits_new_norms_to_what_the_old_ones_gave(to):
    model, batches = trained_batch_norms(), [torch.randn(16, 3, 6, 6).double() + 1 for _ in range(4)]
    swapped, state = convert(deepcopy(model), to).model, deepcopy(model.state_dict())
    wanted = torch.cat([model(x) for x in batches])

    def error(other):
        return ((torch.cat([other(x) for x in batches]) - wanted).norm() / wanted.norm()).item()

    before = error(swapped)
    changes = convert(model, to, calibrate=iter(batches))
    assert [row.layer for row in changes] == ["2", "5", "8", "(model)"]
    assert changes.rows[-1].before == f"error {before:.2g}"
    assert changes.rows[-1].error == pytest.approx(error(model))
    assert error(model) < 0.8 * before
    for row in list(changes)[:-1]:
        assert row.error is not None
        assert "before calibration" in row.note
    assert changes.undo() is model
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_calibration_finds_what_a_gain_and_a_bias_can_give():
    norm = random_(nn.GroupNorm(8, 8)).double()
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), norm).double(), torch.randn(4, 3, 5, 8).double()
    wanted, weight = model(x), norm.weight
    changes = convert(model, "in", calibrate=[(x, "targets are not read")])
    assert model[1].weight is weight
    assert changes.rows[0].error == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(model(x), wanted)
    with pytest.raises(SurgeryError, match="calibrate has no batches"):
        convert(model, "ln", calibrate=[])
