"""The audit finds every planted mistake with its evidence, nothing in clean models, and leaves all as it was."""

import copy
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import normkit as nk
from architectures import published as tiny
from normkit.cli import app
from normkit.diagnostics.audit.checks import CHECKS, table

pytest.importorskip("transformers", reason="models that no one here wrote")


class Images(nn.Module):
    """Convolutions with batch norms, of which one may be recomputed in the backward pass."""

    def __init__(self, trained: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.norm, self.other, self.again = nn.BatchNorm2d(8), nn.BatchNorm2d(8), None
        self.middle, self.head = nn.Identity(), nn.Linear(8, 4)
        if trained:  # running statistics are those of the batch
            self.norm.momentum = self.other.momentum = None
            self(IMAGES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.norm(x) if self.again is None else checkpoint(self.norm, x, use_reentrant=self.again)
        return self.head(self.middle(self.other(self.second(x.relu())).relu().mean((2, 3))))


class RMSNorm(nn.Module):
    """By hand: eps in the dtype of the input, and a gain that counts from an offset."""

    def __init__(self, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset, self.weight = eps, offset, nn.Parameter(torch.ones(16) - offset)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.causal, self.gain = nn.Linear(16, 48), causal, 1.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(self.gain * q, k, v, is_causal=self.causal)


class Tokens(nn.Module):
    """Attention, causal or not, between two norms."""

    def __init__(self, norm: Any = lambda: nn.LayerNorm(16), causal: bool = True) -> None:
        super().__init__()
        self.embed, self.norm, self.attn = nn.Embedding(30, 16), norm(), Attention(causal)
        self.last, self.head = norm(), nn.Linear(16, 30)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.last(x + self.attn(self.norm(x))))


class Few(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:4]


torch.manual_seed(0)
IMAGES, IDS, LARGE = torch.randn(32, 3, 12, 12), torch.randint(0, 30, (16, 12)), torch.randn(16, 8, 64, 64)
OVER_TOKENS = partial(nk.BatchNorm, 16, layout="n * c")
TRAINED, HAND, FROM_ONE = partial(Images, True), partial(Tokens, RMSNorm), partial(Tokens, partial(RMSNorm, offset=1.0))


def tall() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.GroupNorm(8, 8)).to(memory_format=torch.channels_last)


def gains(model: nn.Module, change: Any) -> None:
    for norm in (model.norm, model.last):
        norm.weight.data = change(norm.weight.data)


def rescale(model: nn.Module, by: float) -> None:
    """As of a model that was trained with other weights."""
    model.second.weight.data *= by
    model.other.running_mean *= by
    model.other.running_var *= by**2


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9, weight_decay=0.01)


# A kind; a healthy model; a statement that plants the mistake; the module that is found; what is true of its evidence.
# Where the statement sets ``optimizer``, that is given.
PLANTED = [
    ("one_element", Images, "model.second, model.other = nn.Conv2d(8, 8, 10), nn.InstanceNorm2d(8)", "other", "elements == 1"),
    ("one_element", Images, "model.head = nn.Sequential(nn.Linear(8, 1), nn.LayerNorm(1))", "head.1", "sets == 32"),
    ("acausal_statistic", Tokens, "model.norm = OVER_TOKENS()", "norm", "moved_by_later_tokens > 0.01"),
    ("acausal_statistic", Tokens, "model.norm = nn.LayerNorm((12, 16))", "norm", "moved_by_later_tokens > 0.01"),
    ("running_not_finite", TRAINED, "model.norm.running_var[3] = torch.nan", "norm", "channels == 1"),
    ("gain_convention", Tokens, "gains(model, lambda w: torch.randn(16) / 9)", "norm", "norms == 2 and share_negative > 0.3"),
    ("gain_convention", HAND, "gains(model, torch.zeros_like)", "norm", "median_gain == 0"),
    ("gain_convention", FROM_ONE, "gains(model, lambda w: w + 1)", "norm", "median_gain == 2"),
    ("zero_rows", Images, "parametrizations.weight_norm(model.head).parametrizations.weight.original1.data[2] = 0",
        "head", "(rows, of, first) == (1, 4, 2)"),
    ("large_mean", Tokens, "model.embed.weight.data += 1e5", "norm", "mean_over_std > bound > 1e3"),
    ("running_tiny", TRAINED, "model.norm.running_var[3] = 1e-9", "norm", "channels == 1 and least < eps"),
    ("running_stale", TRAINED, "model.norm.running_mean += 5", "norm", "mean_shift > 5"),
    ("running_of_old_scale", TRAINED, "rescale(model, 5.0); nk.weights.weight_conditioning(model.second)",
        "other", "variance_ratio > 4 > after_rescaling > 0"),
    ("shared_batch_norm", Images, "model.other = model.norm", "norm", "calls == 2 and deviations_apart > 0.5"),
    ("checkpointed_batch_norm", Images, "model.again = False", "norm", "calls_backward == 1"),
    ("checkpointed_batch_norm", Images, "model.again = True", "norm", "calls_backward == 1"),
    ("waking_batch_norm", Images, "model.norm.eval()", "norm", "in_evaluation == 1"),
    ("waking_batch_norm", Images, "model.eval(); model.norm.requires_grad_(False)", "norm", "frozen_parameters == 2"),
    ("decayed_norm", Images, "optimizer = sgd(model)", "norm", "parameters == 4 and weight_decay == 0.01"),
    ("dead_channels", Images, "model.norm.bias.data[[1, 5]] = -20", "norm", "(dead, channels) == (2, 8)"),
    ("attention_logits", Tokens, "model.attn.gain = 400", "attn", "largest_logit > 100 and relative_entropy < 0.5"),
    ("vanishing_eps", HAND, "model.norm.eps = 0.0", "norm", "eps == 0 and not_finite > 0"),
    ("cancelled_bias", Images, "model.first = nn.Conv2d(3, 8, 3)", "first", "biases == 8 and gradient_sum_over_absolute < 1e-4"),
    ("layout_copy", tall, "model[1] = nn.InstanceNorm2d(8)", "1", "bytes_per_call == 4 * LARGE.numel()"),
    ("small_batch", Images, "model.middle = nn.Sequential(Few(), nn.BatchNorm1d(8))", "middle.1", "effective_samples == 4"),
]  # fmt: skip


def batch_of(model: nn.Module) -> Any:
    large = LARGE.to(memory_format=torch.channels_last)
    return IMAGES if isinstance(model, Images) else {"ids": IDS} if isinstance(model, Tokens) else large


def outputs(model: nn.Module, mode: str) -> Tensor:
    given = batch_of(model)
    with torch.no_grad():
        return copy.deepcopy(model).train(mode == "training")(given["ids"] if isinstance(given, dict) else given)


@pytest.mark.parametrize(
    ("kind", "make", "plant", "module", "true"), PLANTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_planted_mistake_is_found_and_mended(kind: str, make: Any, plant: str, module: str, true: str) -> None:
    torch.manual_seed(1)
    model = make()
    options = {"model": model}
    groups = torch.optim.SGD(nk.surgery.param_groups(model, 0.01), 0.1)
    assert kind not in {each.kind for each in nk.audit(model, batch_of(model), optimizer=groups)}
    exec(plant, globals(), options)

    def found() -> list[nk.diagnostics.Finding]:
        return [each for each in nk.audit(batch=batch_of(model), **options) if each.kind == kind]

    first = found()[0]
    assert first.module == module
    assert eval(true, {**globals(), **first.evidence}), first.evidence
    keeps = next(check.keeps for check in CHECKS if check.kind == kind)
    assert first.fixable == bool(keeps)
    if not keeps:
        with pytest.raises(nk.NormkitError, match=kind):
            first.fix()
        return
    wanted = {mode: outputs(model, mode) for mode in (["training", "evaluation"] if keeps == "both" else [keeps])}
    changes = first.fix()
    for mode, output in wanted.items():
        # rounding of float32 through three layers; eps moves by 1e-7 of a variance near 1
        assert_close(outputs(model, mode), output, rtol=1e-4, atol=1e-5)
    assert found() == []
    changes.undo()
    assert found() == [first]


def test_every_kind_is_planted_and_on_the_page() -> None:
    assert {kind for kind, *_ in PLANTED} == {check.kind for check in CHECKS}
    assert table() in (Path(__file__).parent.parent / "docs/audit.md").read_text(), "the page wants what table() gives"


def residual_from_zero() -> nn.Module:
    model = Images()
    nn.init.zeros_(model.other.weight)
    return model


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS, PICTURES, SERIES = {"input_ids": IDS}, torch.randn(32, 3, 32, 32), torch.randn(16, 3, 20)
CLEAN: dict[str, tuple[Any, Any]] = {
    "vit": (lambda: tiny("ViTModel", **SIZES, image_size=32, patch_size=8), PICTURES),
    "bert": (lambda: tiny("BertModel", **SIZES, vocab_size=30), WORDS | {"attention_mask": (IDS > 3).long()}),
    "llama": (lambda: tiny("LlamaForCausalLM", **SIZES, vocab_size=30), WORDS | {"labels": IDS}),
    "gpt2": (lambda: tiny("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=30), (IDS,)),
    "gemma": (lambda: tiny("GemmaForCausalLM", **SIZES, vocab_size=30, head_dim=8, num_key_value_heads=2), WORDS),
    "convnext": (lambda: tiny("ConvNextModel", num_stages=2, hidden_sizes=[16, 32], depths=[2, 2], patch_size=2), PICTURES),
    "resnet": (lambda: tiny("ResNetModel", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]), {"pixel_values": PICTURES}),
    "swin": (lambda: tiny("SwinModel", image_size=32, patch_size=2, embed_dim=8, depths=[2], num_heads=[2]), PICTURES),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, 64, batch_first=True), 2), SERIES),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()), (PICTURES, IDS)),
    "residual from zero": (residual_from_zero, IMAGES),
    "points": (lambda: nn.Sequential(nn.Conv1d(3, 16, 1, bias=False), nn.BatchNorm1d(16), nn.Conv1d(16, 4, 1)), SERIES),
    "both ways": (lambda: nn.Sequential(nn.Conv1d(3, 9, 3, 1, 1, bias=False), nn.BatchNorm1d(9), nn.ReLU()), SERIES),
    "attention to all": (lambda: Tokens(OVER_TOKENS, causal=False), IDS),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found_in_clean_models(name: str) -> None:
    torch.manual_seed(0)
    make, batch = CLEAN[name]
    found = nk.audit(make(), batch)
    assert (str(found), found.notes) == ("nothing found", ())


def test_norms_drop_nothing_meanwhile() -> None:
    model, zeros = Tokens(partial(nk.LayerNorm, 16, dropout=0.5)), []
    model.norm.register_forward_hook(lambda _, args, y: zeros.append(bool((y == 0).any())))
    nk.audit(model, {"ids": IDS})
    assert not zeros[0]
    assert model.norm.dropout == 0.5


class Everything(Images):
    """Dropout, power iteration, a buffer that is replaced, and random numbers in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.head = nn.Dropout(0.5), parametrizations.spectral_norm(nn.Linear(8, 4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return super().forward(x + random.random() + torch.randn(1))


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Tensors, and all else."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    rest = [(p.requires_grad, id(p), id(p.grad)) for p in model.parameters()], [id(b) for b in model.buffers()]
    modules = [(type(m), m.training, [[*v] for v in vars(m).values() if isinstance(v, dict)]) for m in model.modules()]
    random_state = torch.get_rng_state().tolist(), random.getstate()
    return copy.deepcopy([dict(model.state_dict()), gradients, optimizer.state_dict()]), (rest, modules, random_state)


@pytest.mark.parametrize("again", [None, False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_all_is_left_as_it_was(again: bool | None, fails: bool) -> None:
    model = Everything()
    model.again = again
    model.second.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model(IMAGES).sum().backward()
    optimizer.step()
    model.first.weight.grad, model.norm.training = None, False
    model.norm.register_forward_hook(lambda *_: None)
    tensors, rest = state(model, optimizer)
    if fails:
        with pytest.raises(ZeroDivisionError):
            nk.audit(model, IMAGES, optimizer=optimizer, loss=lambda y, x: 1 // 0)
    else:
        nk.audit(model, IMAGES, optimizer=optimizer)
    after = state(model, optimizer)
    assert_close(after[0], tensors, rtol=0, atol=0)
    assert after[1] == rest


def test_reentrant_checkpointing_of_the_first_layer_is_seen() -> None:
    class First(Images):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda x: self.norm(self.first(x)), x.clone().requires_grad_(), use_reentrant=True)
            return self.head(x.relu().mean((2, 3)))

    assert [each.kind for each in nk.audit(First(), IMAGES)] == ["checkpointed_batch_norm"]


def test_a_step_in_the_backward_pass_does_not_happen() -> None:
    model = Images()
    model.head.weight.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    with torch.no_grad():
        assert nk.audit(model, IMAGES).notes == ()
    assert model.head.weight.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), RMSNorm(1e-8), nn.Linear(16, 2)).to(dtype)
    kinds = [each.kind for each in nk.audit(model, torch.randn(16, 4, dtype=dtype))]
    assert kinds == ["vanishing_eps"] * (dtype == torch.float16)


def test_findings_are_data() -> None:
    found = nk.audit(nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(5))), IMAGES)
    assert len(found) == len(found.at_least("info")) == 5 > len(found.at_least("warning"))
    assert str(found).count("bias=False") == 1
    assert "cancelled_bias (2 more modules)" in str(found)
    assert json.loads(found.json())["findings"][0]["evidence"]["biases"] == 3
    refused = nk.audit(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), torch.randn(1, 4))
    assert [(each.kind, each.module) for each in refused] == [("one_element", "1")]
    assert "Expected more than 1 value per channel" in refused.notes[0]


def test_a_loader_and_an_optimizer_of_another_model_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    loader = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=16)
    with pytest.raises(nk.errors.OptionError, match=r"give one batch: next\(iter\(loader\)\)"):
        nk.audit(model, loader)
    with pytest.raises(nk.errors.OptionError, match="optimizer has none of the model's parameters"):
        nk.audit(model, torch.randn(16, 4), optimizer=sgd(copy.deepcopy(model)))
    nk.audit(model, next(iter(loader)), optimizer=torch.optim.SGD(model[1].parameters(), 0.1))  # of a part


def test_a_loss_gets_the_whole_batch() -> None:
    model, batch, got = nn.Linear(4, 2), (torch.randn(16, 4), torch.randn(16, 2)), []
    nk.audit(model, batch, loss=lambda y, b: got.append(b) or F.mse_loss(y, b[1]))
    assert got
    assert all(each is batch for each in got)


MINE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers
    def forward(self, x):
        return self.layers(x)
def good(): return Net(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)))
def wrong(): return Net(nn.Linear(7, 3))
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
        ("wrong", 2, "audited.py:9"),
    ],
)
def test_the_command(words: str, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audited.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, f"audit audited:{words} --data audited:data".split())
    assert done.exit_code == code, done.output
    assert said in done.output + done.stderr


@pytest.mark.parametrize("words", ["audited:wrong", "audited:good", "audited:late", "resnet18"])
def test_an_error_on_the_default_data_says_so(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audited.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["audit", words])
    if words == "audited:late":  # no such factory: not of the data
        assert "--data package.module" not in done.stderr
    else:
        assert done.stderr.strip().endswith("the default data, digits; name yours: --data package.module:factory")
    assert done.exit_code == 2
