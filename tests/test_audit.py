"""The audit finds every planted mistake with its evidence, nothing in clean models, and leaves all as it was."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import normkit as nk
from normkit.cli import app
from normkit.diagnostics.audit import checks
from normkit.diagnostics.audit.checks import CHECKS

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
Options = dict[str, Any]


class Convolutions(nn.Module):
    """Two convolutions with batch norms, which may be one, and recomputed in the backward pass."""

    def __init__(self, again: str = "") -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.norm, self.other, self.again = nn.BatchNorm2d(8), nn.BatchNorm2d(8), again
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        norm = self.norm
        x = checkpoint(norm, x, use_reentrant=self.again == "reentrant") if self.again else norm(x)
        x = self.other(self.second(x.relu()))
        return self.head(x.relu().mean((2, 3)))


class Tokens(nn.Module):
    """Causal attention, or attention to all, between two norms."""

    def __init__(self, norm: nn.Module, causal: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.embed, self.norm, self.attn = nn.Embedding(30, 16), norm, Attention(causal, gain)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 30)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.last(x + self.attn(self.norm(x))))


class Attention(nn.Module):
    def __init__(self, causal: bool, gain: float) -> None:
        super().__init__()
        self.qkv, self.causal, self.gain = nn.Linear(16, 48), causal, gain

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(self.gain * q, k, v, is_causal=self.causal)


class Few(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[:4])


class HalfEps(nn.Module):
    """RMS normalization that adds eps in the dtype of its input."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class GainNorm(HalfEps):
    """RMS normalization with gain 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


GainNorm.__name__ = "GainRMSNorm"
HalfEps.__name__ = "HalfEpsRMSNorm"


def _set(module: str, key: str, change: Callable[[Tensor], Any]) -> Callable[[nn.Module], None]:
    def plant(model: nn.Module) -> None:
        with torch.no_grad():
            tensor = getattr(model.get_submodule(module), key)
            tensor.copy_(change(tensor))

    return plant


def _trained() -> nn.Module:
    """Convolutions whose running statistics are those of the batch."""
    model = Convolutions()
    model.norm.momentum = model.other.momentum = None
    model(IMAGES)
    return model


def _conditioned(model: nn.Module) -> None:
    nk.weights.weight_conditioning(model.second)


def _asleep(model: nn.Module) -> None:
    model.norm.eval()


def _alike(model: nn.Module) -> None:
    model.other = model.norm


def _gains_of_zero(model: nn.Module) -> None:
    for norm in (model.norm, model.last):
        norm.weight.data = 0.1 * torch.randn(16)


def _gains_of_two(model: nn.Module) -> None:
    for norm in (model.norm, model.last):
        norm.weight.data = 1 + 0.1 * torch.randn(16)


def _from_one() -> nn.Module:
    model = Tokens(GainNorm(1e-6))
    model.last = GainNorm(1e-6)
    for norm in (model.norm, model.last):
        norm.weight.data.zero_()
    return model


def _zero_row(model: nn.Module) -> None:
    weight_norm(model.head)
    model.head.parametrizations.weight.original1.data[2] = 0


def _decaying(model: nn.Module) -> Options:
    return {"optimizer": torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9, weight_decay=0.01)}


def _spread(model: nn.Module) -> Options:
    return {"optimizer": torch.optim.SGD(nk.surgery.param_groups(model, 0.01), 0.1)}


torch.manual_seed(0)
IMAGES, IDS, FLAT = torch.randn(32, 3, 12, 12), torch.randint(0, 30, (16, 12)), torch.randn(16, 8, 64, 64)


def _tall(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), norm).to(memory_format=torch.channels_last)


class Plant(NamedTuple):
    """A mistake: a healthy model and its batch, what spoils it, where, and what the evidence must say."""

    kind: str
    make: Callable[[], nn.Module]
    batch: Any
    plant: Callable[[nn.Module], Any]
    module: str
    evidence: Callable[[dict[str, float]], bool]
    healthy: Callable[[nn.Module], Options] = lambda model: {}
    options: Callable[[nn.Module], Options] = lambda model: {}


def _into(**attributes: Any) -> Callable[[nn.Module], None]:
    def plant(model: nn.Module) -> None:
        for key, value in attributes.items():
            setattr(model, key, value)

    return plant


PLANTED = [
    Plant(
        "one_element",
        Convolutions,
        IMAGES,
        _into(norm=nn.GroupNorm(8, 8), head=nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 1), nn.LayerNorm(1))),
        "head.2",
        lambda e: e["elements"] == 1 and e["sets"] == 32,
    ),
    Plant(
        "acausal_statistic",
        lambda: Tokens(nn.LayerNorm(16)),
        IDS,
        _into(norm=nk.BatchNorm(16, layout="n * c")),
        "norm",
        lambda e: e["moved_by_later_tokens"] > 0.01,
    ),
    Plant(
        "acausal_statistic",
        lambda: Tokens(nn.RMSNorm(16)),
        {"ids": IDS},
        _into(norm=nn.LayerNorm((12, 16))),
        "norm",
        lambda e: e["moved_by_later_tokens"] > 0.01,
    ),
    Plant(
        "running_not_finite",
        _trained,
        IMAGES,
        _set("norm", "running_var", lambda v: v.index_fill(0, torch.tensor([3]), torch.nan)),
        "norm",
        lambda e: e["channels"] == 1,
    ),
    Plant(
        "gain_convention",
        lambda: Tokens(nn.LayerNorm(16)),
        IDS,
        _gains_of_zero,
        "norm",
        lambda e: abs(e["median_gain"]) < 0.2 and e["norms"] == 2,
    ),
    Plant(
        "gain_convention",
        _from_one,
        IDS,
        _gains_of_two,
        "norm",
        lambda e: e["median_gain"] == pytest.approx(2, abs=0.2),
    ),
    Plant(
        "zero_rows", Convolutions, IMAGES, _zero_row, "head", lambda e: (e["rows"], e["of"], e["first"]) == (1, 4, 2)
    ),
    Plant(
        "large_mean",
        lambda: Tokens(nn.LayerNorm(16)),
        IDS,
        _set("embed", "weight", lambda w: w + 1e5),
        "norm",
        lambda e: e["mean_over_std"] > e["bound"] > 1e3,
    ),
    Plant(
        "running_tiny",
        _trained,
        IMAGES,
        _set("norm", "running_var", lambda v: v.index_fill(0, torch.tensor([3]), 1e-9)),
        "norm",
        lambda e: e["channels"] == 1 and e["least"] < e["eps"],
    ),
    Plant(
        "running_stale",
        _trained,
        IMAGES,
        _set("norm", "running_mean", lambda m: m + 5),
        "norm",
        lambda e: e["mean_shift"] > 5,
    ),
    Plant(
        "running_of_old_scale",
        _trained,
        IMAGES,
        lambda m: (
            _set("second", "weight", lambda w: w * 5)(m),
            m.other.running_var.mul_(25),
            m.other.running_mean.mul_(5),
            _conditioned(m),
        ),
        "other",
        lambda e: e["variance_ratio"] > 4 > e["after_rescaling"],
    ),
    Plant(
        "shared_batch_norm",
        Convolutions,
        IMAGES,
        _alike,
        "norm",
        lambda e: e["calls"] == 2 and e["deviations_apart"] > 0.5,
    ),
    Plant(
        "checkpointed_batch_norm", Convolutions, IMAGES, _into(again="free"), "norm", lambda e: e["calls_backward"] == 1
    ),
    Plant(
        "checkpointed_batch_norm",
        Convolutions,
        IMAGES,
        _into(again="reentrant"),
        "norm",
        lambda e: e["calls_backward"] == 1,
    ),
    Plant("waking_batch_norm", Convolutions, IMAGES, _asleep, "norm", lambda e: e["in_evaluation"] == 1),
    Plant(
        "waking_batch_norm",
        lambda: Convolutions().eval(),
        IMAGES,
        lambda m: m.norm.requires_grad_(False),
        "norm",
        lambda e: e["frozen_parameters"] == 2,
    ),
    Plant(
        "decayed_norm",
        Convolutions,
        IMAGES,
        lambda m: None,
        "norm",
        lambda e: e["parameters"] == 4 and e["weight_decay"] == 0.01,
        _spread,
        _decaying,
    ),
    Plant(
        "dead_channels",
        Convolutions,
        IMAGES,
        _set("norm", "bias", lambda b: b.index_fill(0, torch.tensor([1, 5]), -20.0)),
        "norm",
        lambda e: (e["dead"], e["channels"]) == (2, 8),
    ),
    Plant(
        "attention_logits",
        lambda: Tokens(nn.LayerNorm(16)),
        IDS,
        lambda m: setattr(m.attn, "gain", 400.0),
        "attn",
        lambda e: e["largest_logit"] > 100 and e["relative_entropy"] < 0.5,
    ),
    Plant(
        "vanishing_eps",
        lambda: Tokens(HalfEps(1e-6)),
        IDS,
        lambda m: setattr(m.norm, "eps", 0.0),
        "norm",
        lambda e: e["eps"] == 0 and e["not_finite"] > 0,
    ),
    Plant(
        "cancelled_bias",
        Convolutions,
        IMAGES,
        _into(first=nn.Conv2d(3, 8, 3)),
        "first",
        lambda e: e["biases"] == 8 and e["gradient_sum_over_absolute"] < 1e-4,
    ),
    Plant(
        "layout_copy",
        lambda: _tall(nn.GroupNorm(8, 8)),
        FLAT.to(memory_format=torch.channels_last),
        lambda m: m.__setitem__(1, nn.InstanceNorm2d(8)),
        "1",
        lambda e: e["bytes_per_call"] == 4 * FLAT.numel(),
    ),
    Plant(
        "small_batch",
        Convolutions,
        IMAGES,
        lambda m: m.head.__class__ and setattr(m, "head", nn.Sequential(nn.Linear(8, 8), Few(), nn.Linear(8, 4))),
        "head.1.norm",
        lambda e: e["effective_samples"] < 16 and e["samples"] == 4,
    ),
]


def _outputs(model: nn.Module, batch: Any, mode: str) -> Tensor:
    model = copy.deepcopy(model).train(mode == "training")
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: f"{case.kind}-{case.make.__name__}")
def test_a_planted_mistake_is_found_and_mended(case: Plant) -> None:
    torch.manual_seed(1)
    model = case.make()
    before = nk.audit(model, case.batch, **case.healthy(model))
    assert [each for each in before if each.kind == case.kind] == []
    case.plant(model)
    options = case.options(model)
    found = [each for each in nk.audit(model, case.batch, **options) if each.kind == case.kind]
    assert [each.module for each in found][:1] == [case.module], found
    assert case.evidence(found[0].evidence), found[0].evidence
    keeps = next(check.keeps for check in CHECKS if check.kind == case.kind)
    assert found[0].fixable == bool(keeps)
    if not keeps:
        with pytest.raises(nk.NormkitError, match=case.kind):
            found[0].fix()
        return
    modes = ["training", "evaluation"] if keeps == "both" else [keeps]
    wanted = {mode: _outputs(model, case.batch, mode) for mode in modes}
    changes = found[0].fix()
    for mode, output in wanted.items():
        # rounding of float32 through three layers; eps moves by 1e-7 of a variance near 1
        assert_close(_outputs(model, case.batch, mode), output, rtol=1e-4, atol=1e-5)
    assert [each for each in nk.audit(model, case.batch, **options) if each.kind == case.kind] == []
    changes.undo()
    assert [each.kind for each in nk.audit(model, case.batch, **options) if each.kind == case.kind] != []


def test_every_kind_is_planted() -> None:
    assert {case.kind for case in PLANTED} == {check.kind for check in CHECKS}


def _tiny(name: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, f"{name.split('For')[0].removesuffix('Model').removesuffix('LMHead')}Config")
    return getattr(transformers, name)(config(**sizes))


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_WORDS, _PICTURES = {"input_ids": IDS}, torch.randn(32, 3, 32, 32)
CLEAN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "vit": (lambda: _tiny("ViTModel", **_SIZES, image_size=32, patch_size=8), _PICTURES),
    "bert": (lambda: _tiny("BertModel", **_SIZES, vocab_size=30), _WORDS | {"attention_mask": (IDS > 3).long()}),
    "llama": (lambda: _tiny("LlamaForCausalLM", **_SIZES, vocab_size=30), _WORDS | {"labels": IDS}),
    "gpt2": (lambda: _tiny("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=30), (IDS,)),
    "gemma": (lambda: _tiny("GemmaForCausalLM", **_SIZES, vocab_size=30, head_dim=8, num_key_value_heads=2), _WORDS),
    "convnext": (
        lambda: _tiny("ConvNextModel", num_stages=2, hidden_sizes=[16, 32], depths=[2, 2], patch_size=2),
        {"pixel_values": _PICTURES},
    ),
    "resnet": (
        lambda: _tiny("ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
        _PICTURES,
    ),
    "swin": (
        lambda: _tiny(
            "SwinModel", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        _PICTURES,
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        torch.randn(16, 12, 32),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(2), nn.LazyLinear(4)
        ),
        (_PICTURES, torch.zeros(32)),
    ),
    "zero-init residual": (lambda: _into_block(), IMAGES),
    "points, each by itself": (
        lambda: nn.Sequential(nn.Conv1d(3, 16, 1, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 4, 1)),
        torch.randn(16, 3, 20),
    ),
    "convolution over time, both ways": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16), nn.Conv1d(16, 4, 3, padding=1)
        ),
        torch.randn(16, 3, 20),
    ),
    "attention to all behind a batch norm": (lambda: Tokens(nk.BatchNorm(16, layout="n * c"), causal=False), IDS),
}


def _into_block() -> nn.Module:
    model = Convolutions()
    nn.init.zeros_(model.other.weight)
    return model


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found_in_clean_models(name: str) -> None:
    torch.manual_seed(0)
    make, batch = CLEAN[name]
    model = make()
    if name == "cnn":
        with pytest.raises(nk.errors.OptionError, match="run the model once"):
            nk.audit(model, batch)
        model(batch[0])
    found = nk.audit(model, batch, loss=None)
    assert str(found) == "nothing found"
    assert (len(found), found.notes) == (0, ())


class Everything(Convolutions):
    """Dropout, power iteration, and random numbers of three kinds in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        nn.utils.parametrizations.spectral_norm(self.head)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.drop(super().forward(x + random.random() + torch.randn(1)))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Tensors, and all else."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    tensors = [{**model.state_dict()}, {k: g for k, g in gradients.items() if g is not None}, optimizer.state_dict()]
    rest = (
        [
            (type(m), m.training, {k: [*v] if isinstance(v, dict) else None for k, v in vars(m).items()})
            for m in model.modules()
        ],
        [(id(p), p.requires_grad, id(p.grad)) for p in model.parameters()],
        [id(buffer) for buffer in model.buffers()],
        torch.get_rng_state().tolist(),
        random.getstate(),
    )
    return copy.deepcopy(tensors), rest


@pytest.mark.parametrize("again", ["", "free", "reentrant"])
@pytest.mark.parametrize("fails", [False, True])
def test_all_is_left_as_it_was(again: str, fails: bool) -> None:
    model = Everything()
    model.again = again
    model.second.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model(IMAGES).sum().backward()
    optimizer.step()
    model.first.weight.grad, model.norm.training = None, False
    model.norm.register_forward_hook(lambda *_: None)
    before = _state(model, optimizer)
    if fails:
        with pytest.raises(ZeroDivisionError):
            nk.audit(model, IMAGES, optimizer=optimizer, loss=lambda y, x: 1 // 0)
    else:
        nk.audit(model, IMAGES, optimizer=optimizer)
    after = _state(model, optimizer)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]


def test_a_step_in_the_backward_pass_does_not_happen() -> None:
    model = Convolutions()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    nk.audit(model, IMAGES)
    assert model.head.weight.any()


def test_a_norm_that_refuses_one_element_is_found_too() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    found = nk.audit(model, torch.randn(1, 4))
    assert [(each.kind, each.module) for each in found] == [("one_element", "2")]
    assert "Expected more than 1 value per channel" in found.notes[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), HalfEps(1e-8), nn.Linear(16, 2)).to(dtype)
    kinds = [each.kind for each in nk.audit(model, torch.randn(16, 4, dtype=dtype))]
    assert kinds == ["vanishing_eps"] * (dtype == torch.float16)


def test_findings_are_data() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(5)))
    found = nk.audit(model, IMAGES)
    assert len(found) == len(found.at_least("info")) == 5
    assert found[:2] == found.findings[:2]
    assert found.at_least("warning") == ()
    assert "cancelled_bias: 2 more modules" in str(found)
    read = json.loads(found.json())
    assert read["findings"][0]["module"] == "0.0"
    assert read["findings"][0]["evidence"]["biases"] == 3
    with pytest.raises(nk.errors.OptionError, match="did you mean 'error'"):
        found.at_least("eror")


MINE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, wrong=False):
        super().__init__()
        self.layers, self.wrong = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)), wrong
    def forward(self, x):
        return self.layers(x) if not self.wrong else x @ x
def good(): return Net()
def wrong(): return Net(True)
def data(): return torch.randn(90, 8), torch.arange(90) % 3
def decays(model): return torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("good", 0, "cancelled_bias"),
        ("good --json", 0, '{"findings": [{"kind": "cancelled_bias", "module": "layers.0"'),
        ("good --fail-on warning", 0, "info"),
        ("good --fail-on info", 1, "bias=False"),
        ("good --optimizer audited:decays --fail-on warning", 1, "decayed_norm"),
        ("good --samples 1", 0, "one_element"),
        ("good --fail-on warn", 2, "did you mean 'warning'"),
        ("good --optimizer decays", 2, "names no factory"),
        ("wrong", 2, "audited.py:9"),
    ],
)
def test_the_command(words: str, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audited.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, ["audit", f"audited:{words.split()[0]}", "--data", "audited:data", *words.split()[1:]]
    )
    assert done.exit_code == code, done.output
    assert said in done.output + done.stderr


def test_the_page_lists_every_kind() -> None:
    assert checks.table() in (ROOT / "docs/audit.md").read_text(), (
        "put in what normkit.diagnostics.audit.checks.table gives"
    )
