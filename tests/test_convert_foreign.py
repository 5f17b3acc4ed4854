from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import foreign_norms as foreign
from normkit import GroupNorm, RMSNorm, SyncBatchNorm, convert
from normkit.core.errors import NotationError, OptionError, SurgeryError


class LayerNorm2d(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-6) * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize(
    ("norm", "to", "back", "shape"),
    [
        (foreign.LlamaRMSNorm(8), "gn:1", "rms", (3, 8)),
        (foreign.GemmaRMSNorm(8, 3e-5), "gn:1", "rms", (3, 8)),
        (foreign.LlamaRMSNorm(3), "gn:1", "rms", (3, 3)),
        (LayerNorm2d(8), "gn:8", "ln:c", (2, 8, 3, 5)),
        (foreign.ChannelsNorm(8), "gn:8", "ln:c", (2, 8, 3, 5)),
    ],
)
def test_foreign_norms_are_known_by_what_they_do(norm, to, back, shape):
    # To another kind and back: what was read (gain, bias, eps, axes) is all there.
    model, x = nn.Sequential(foreign.random_(deepcopy(norm))), torch.randn(shape) * 1e-2
    state, wanted = torch.get_rng_state(), model(x)
    convert(model, to)
    convert(model, back)
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(
        torch.get_rng_state(), state, rtol=0, atol=0
    )  # probing draws nothing from the global generator


@pytest.mark.parametrize("norm", [foreign.GemmaRMSNorm(8, 3e-5), RMSNorm(8, eps=3e-5, offset=1.0)])
@pytest.mark.parametrize("to", ["ln", "gn:2", "rms:c"])
def test_one_plus_weight_keeps_its_parameter(norm, to):
    model = nn.Sequential(foreign.random_(deepcopy(norm)))
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


class SquaredNorm(foreign.LlamaRMSNorm):
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


def test_frozen_batch_normalization_both_ways():
    model = nn.Sequential(foreign.DetectorsFrozenBatchNorm2d(4), nn.BatchNorm2d(4)).double()
    x = torch.randn(3, 4, 5, 5).double()
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
    (nn.BatchNorm2d(48), "gn:32", SurgeryError, r"0: 48 channels do not .* 32 groups; .*divide 48: 1, 2, 3, .*48"),
    (nn.LayerNorm((4, 5, 5)), "bn", SurgeryError, r"0: it normalizes over the axes 4x5x5.*ln, rms, dyt.* and none"),
    (foreign.OptionalGateNorm(4, True), "ln", SurgeryError, r"0 \(OptionalGateNorm\).*takes hidden_states, gate"),
    (SquaredNorm(4), "ln", SurgeryError, r"0 \(SquaredNorm\).*fits neither"),
    (FixedScaleNorm2d(), "ln", SurgeryError, r"0 \(FixedScaleNorm2d\).*parameters \(none\)"),
    (NormAndSine(4), "ln", SurgeryError, r"0 \(NormAndSine\).*it is not BatchNorm2d, with or without an act"),
    (foreign.BatchNormAct(4, nn.Hardswish()), "ln", SurgeryError, r"0: it applies Hardswish\(\) too, which ln has no"),
    (nn.BatchNorm2d(4, track_running_stats=False), "frozen_bn", SurgeryError, r"0: frozen_bn is made of a batch norm"),
    (replaced_forward(), "ln", SurgeryError, r"forward was replaced on the object"),
    (nn.LazyBatchNorm2d(), "ln", SurgeryError, r"no size yet"),
    (nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), "ln", SurgeryError, r"parametrized.*fold"),
    (nn.Linear(2, 2), "bn", SurgeryError, r"no activation norm"),
    (nn.BatchNorm2d(4), "bm", NotationError, r"'bm' is not known; did you mean 'bn'\?; norms that exist: .*gn:GROUPS"),
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


class SizelessRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class UnitNorm(nn.Module):
    """No activation norm: it divides by the length."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


def test_norms_without_parameters_are_norms():
    model, x = nn.Sequential(nn.Linear(8, 8), foreign.BareNorm(8), UnitNorm()), torch.randn(3, 8)
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
