"""normkit's layers in the place of torch's: the same function, parameters and keys; and every verb on models of others."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import architectures
import foreign_norms as foreign
import normkit as nk
from architectures import MODELS, VERBS, found, make, outputs
from normkit.engine.layer import Layer


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.GroupNorm(4, 8),
        nn.InstanceNorm2d(8, affine=True),
        nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        nn.Flatten(),
        nn.LazyLinear(12),
        nn.LayerNorm(12, eps=1e-6),
        nn.RMSNorm(12),
        nn.LayerNorm((12,), bias=False),
    )


def test_it_computes_the_same_with_the_same_parameters() -> None:
    model, x = network().double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model(x)
    theirs, keys = copy.deepcopy(model), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    changes = nk.accelerate(model, example=x)
    assert len(changes.rows) == 7
    said = {row.before.partition("(")[0] for row in changes if "no longer holds" in row.note}
    assert said == {"BatchNorm2d", "InstanceNorm2d"}
    assert sum(isinstance(module, Layer) for module in model.modules()) == 7
    assert list(model.state_dict()) == keys
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    for training in (True, False):
        model.train(training)
        theirs.train(training)
        found, wanted = (m(x).square().sum() for m in (model, theirs))
        assert_close(found, wanted, rtol=1e-9, atol=1e-9)  # float64, a few operations
        gradients = [torch.autograd.grad(y, list(m.parameters())) for y, m in ((found, model), (wanted, theirs))]
        assert_close(*gradients, rtol=1e-7, atol=1e-7)  # nine layers deep
    assert_close(model.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-9)


LAST, FIRST = (4, 5, 8), (4, 8, 5, 6)
FAMILIES = {
    "Llama": (foreign.LlamaRMSNorm(8), LAST, "RMSNorm((8,), eps=1e-06, elementwise_affine=True, cast='before weight')"),
    "late": (foreign.LateNorm(8, early=False), LAST, "RMSNorm((8,), eps=1e-06, elementwise_affine=True)"),
    "Gemma": (foreign.GemmaRMSNorm(8), LAST, "RMSNorm((8,), eps=1e-06, elementwise_affine=True, offset=1.0)"),
    "no bias": (foreign.CenteredNorm(8), LAST, "LayerNorm((8,), eps=1e-06, elementwise_affine=True, bias=False)"),
    "bare": (foreign.BareNorm(8), LAST, "LayerNorm((8,), eps=1e-05, elementwise_affine=False, bias=False)"),
    "channels": (foreign.ChannelsNorm(8), FIRST, "LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True, over"),
    "bn relu": (foreign.BatchNormAct(8, nn.ReLU()), FIRST, "BatchNorm("),
    "bn": (foreign.BatchNormAct(8, nn.Identity()), FIRST, "BatchNorm("),
    "per head": (foreign.HeadsNorm((4, 8)), (2, 3, 4, 8), "LayerNorm((4, 8), eps=1e-06, elementwise_affine=True, b"),
    "gate last": (foreign.GatedNorm(8, True), LAST, "GatedRMSNorm(8, eps=1e-06, norm_before_gate=True, groups=1, cast"),
    "gate first": (foreign.OptionalGateNorm(8, False), LAST, "GatedRMSNorm(8, eps=1e-06, norm_before_gate=False"),
    "gate and groups": (foreign.GatedNorm(8, False, 2), LAST, "GatedRMSNorm(8, eps=1e-06, norm_before_gate=False, g"),
    "gn silu": (foreign.GroupNormAct(8), FIRST, "GroupNorm("),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_any_make_are_known_by_what_they_compute(family: str, dtype: torch.dtype) -> None:
    norm, shape, wanted = FAMILIES[family]
    model, x = nn.ModuleDict({"norm": copy.deepcopy(norm)}).to(dtype), torch.randn(shape).to(dtype)
    theirs, state = copy.deepcopy(model["norm"]), list(model.state_dict())
    parameters, changes = list(model.parameters()), nk.accelerate(model)
    assert not changes.passed_over
    assert str(model["norm"]).startswith(wanted)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state
    given = (x, torch.randn(shape).to(dtype)) if "gate" in family else (x,)
    for training in (True, False):
        y, z = model["norm"].train(training)(*given), theirs.train(training)(*given)
        assert y.dtype == z.dtype
        if dtype == torch.bfloat16 and isinstance(model["norm"], nk.RMSNorm | nk.GatedRMSNorm):
            assert (y == z).float().mean() > 0.98  # the same order of rounding
        # Classes that compute in float32 whatever comes in; bfloat16 keeps 8 bits.
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert_close(y, z, rtol=tolerance, atol=tolerance)


def test_what_it_can_not_take_over_is_said() -> None:
    class TwiceNorm(foreign.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    model = nn.Sequential(
        foreign.BatchNormAct(4, nn.Hardswish()),
        foreign.BatchNormAct(4, nn.ReLU(), p=0.5),
        TwiceNorm(4),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.SyncBatchNorm(4),
        nn.LayerNorm(4),
        foreign.SigmoidGateNorm(4, True),
    )
    changes = nk.accelerate(model)
    assert [row.layer for row in changes] == ["5"]
    reasons = [left.reason for left in changes.passed_over]
    wanted = "applies Hardswish", "applies Sequential", "fits neither", "keeps running", "no faster kernel", "takes"
    assert [said in reason for said, reason in zip(wanted, reasons, strict=True)] == [True] * 6
    with pytest.raises(nk.errors.SurgeryError, match=r"0 \(BatchNormAct\): it applies Hardswish"):
        nk.accelerate(model, on_refusal="raise")


def test_what_it_leaves_and_refuses() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nk.LayerNorm(3), nn.LayerNorm(3))
    kept = list(model)
    assert [row.layer for row in nk.accelerate(model).rows] == ["2"]
    assert model[0] is kept[0]
    assert model[1] is kept[1]
    assert nk.accelerate(model).rows == ()
    with pytest.raises(nk.errors.SurgeryError, match="does not run"):
        nk.accelerate(nn.Sequential(nn.LayerNorm(3)), example=torch.randn(2, 5))
    root = nk.accelerate(nn.LayerNorm(3)).model
    assert isinstance(root, nk.LayerNorm)


def test_running_statistics_of_a_half_model_become_wide() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).bfloat16()
    x = torch.randn(2, 3, 5, 5).bfloat16()
    model(x)
    wanted, before = copy.deepcopy(model).eval()(x), copy.deepcopy(model[1].state_dict())
    nk.accelerate(model)
    assert model[1].running_var.dtype == torch.float32
    assert_close(model[1].running_var, before["running_var"].float(), rtol=0, atol=0)
    assert_close(model.eval()(x), wanted)


def flagged(kept: bool) -> nn.Module:
    """A batch norm without running statistics, or with such as stay, as the flag was set later."""
    norm = nn.BatchNorm2d(4, track_running_stats=kept)
    norm.track_running_stats = False
    return norm


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "change",
    [nk.accelerate, lambda m: nk.convert(m, "sync_bn", on_refusal="leave"), lambda m: nk.convert(m, "ghost:8")],
    ids=["accelerate", "sync_bn", "ghost"],
)
def test_the_flag_of_running_statistics_goes_over(change: Callable[[nn.Module], Any], kept: bool) -> None:
    model, x = nn.Sequential(flagged(kept)), torch.randn(8, 4, 3, 3) * 2 + 3
    theirs = copy.deepcopy(model)
    changes = change(model)
    assert len(changes) + len(changes.passed_over) == 1
    assert list(model.state_dict()) == list(theirs.state_dict())
    for training in (True, False, True):
        assert_close(model.train(training)(x), theirs.train(training)(x))
    assert_close(model.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_the_flag_goes_to_and_fro_or_is_refused() -> None:
    bare = {"track_running_stats": False}
    for norm, to in ((nk.BatchNorm(4, **bare), "sync_bn"), (nn.SyncBatchNorm(4, **bare), "bn")):
        made: Any = nk.convert(norm, to).model
        assert (made.running_mean, made.track_running_stats) == (None, False)
    model = nn.Sequential(flagged(True))
    with pytest.raises(nk.errors.SurgeryError, match="set it back to True, drop the buffers"):
        nk.convert(model, "renorm")
    assert len(nk.convert(model, "renorm", on_refusal="leave").passed_over) == 1
    assert nk.convert(model, "gn:2").rows[0].note == "running statistics dropped"


def test_attributes_that_are_gone_are_told() -> None:
    norms = nn.RMSNorm(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)
    model = nn.Sequential(foreign.LlamaRMSNorm(4), *norms)
    model.append(nn.InstanceNorm1d(4))
    notes = [row.note for row in nk.accelerate(model)]
    assert not hasattr(model[0], "variance_epsilon")
    assert notes[0] == "its variance_epsilon, early dropped"
    assert not any("dropped" in note for note in notes[1:])


needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

# How many norms accelerate takes over: all, but for frozen ones.
NORMS = {
    "Llama": 3, "Mistral": 3, "Qwen2": 3, "Qwen3": 5, "Gemma": 3, "Gemma2": 5, "Phi3": 3, "Olmo": 3, "Olmo2": 5, "Cohere": 2,
    "Mixtral": 3, "Mamba": 2, "T5Encoder": 3, "Bert": 3, "ViT": 3, "Dinov2": 3, "ResNet": 6, "RegNet": 9, "ConvNextV2": 9,
    "Segformer": 19, "Wav2Vec2": 5, "Detr": 6, "UNet of diffusion": 8, "DiT": 3, "norm and activation in one": 3, "DenseNet": 4,
    "torch.nn.Transformer": 7,
}  # fmt: skip


@needs_transformers
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", MODELS)
def test_every_verb_on_models_that_people_run(name: str, verb: str) -> None:
    result = found(name, verb)
    if VERBS[verb].exact:
        assert result.error < 1e-5  # a few roundings of float32, through one block
    if verb == "accelerate":
        assert result.changed == NORMS[name]
    if result.refused:
        assert verb in ("freeze", "recalibrate")
        assert name not in ("ResNet", "RegNet", "DenseNet", "norm and activation in one")
    elif verb in ("condition", "recipe keep+wn", "plain, accept", "param_groups"):
        assert result.changed


@needs_transformers
def test_the_table_of_verbs_is_current() -> None:
    text = architectures.PAGE.read_text()
    assert architectures.with_table(text) == text, "run: python tests/architectures.py"


@needs_transformers
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Olmo2", "T5Encoder", "Cohere"])
def test_half_precision_rounds_where_it_did(name: str) -> None:
    model, x = make(name, torch.bfloat16)
    wanted = copy.deepcopy(model)
    nk.accelerate(model, example=x)
    pairs = zip(outputs(model, x), outputs(wanted, x), strict=True)
    # Float32 statistics summed in another order now and then round to the neighbour.
    assert all(float((a == b).double().mean()) > 0.9 for a, b in pairs)
