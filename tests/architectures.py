"""Small models of the architectures that people run, the verbs of surgery, and the table of both in docs/surgery.md.

``python tests/architectures.py`` writes the table between the lines ``<!-- verbs -->`` and ``<!-- end -->``.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk
from foreign_norms import BatchNormAct, ChannelsNorm, Standardizing
from normkit.core.errors import SurgeryError
from normkit.surgery.changes import Change, Changes
from normkit.surgery.watch import run_on, tensors_in

PAGE = Path(__file__).parent.parent / "docs/surgery.md"
_BLOCK = re.compile(r"(<!-- verbs -->\n).*?(<!-- end -->)", re.DOTALL)

# Of transformers: the class's name without Model, and its configuration


TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
CONVOLVED = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
BACKBONE = {**CONVOLVED, "layer_type": "basic", "out_features": ["stage1", "stage2"]}
PATCHES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SPEECH = {
    **{key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 3, "use_timm_backbone": False,
    "use_pretrained_backbone": False, "backbone": BACKBONE,
}  # fmt: skip
CONFIGURED: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma": {**GROUPED, "head_dim": 8},
    "Gemma2": {**GROUPED, "head_dim": 8},
    "Phi3": GROUPED,
    "Olmo": GROUPED,
    "Olmo2": GROUPED,
    "Cohere": GROUPED,
    "Mixtral": {**GROUPED, "num_local_experts": 2},
    "Mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 64},
    "T5Encoder": T5,
    "Bert": TEXT,
    "ViT": PATCHES,
    "Dinov2": PATCHES,
    "ResNet": {**CONVOLVED, "layer_type": "basic"},
    "RegNet": {**CONVOLVED, "groups_width": 8},
    "ConvNextV2": PYRAMID,
    "Segformer": {**PYRAMID, "num_attention_heads": [1, 2, 2, 2]},
    "Wav2Vec2": SPEECH,
    "Detr": DETR,
}


class Block(nn.Module):
    """A residual block of a diffusion UNet: group norms, and a shift by the time's embedding."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, wide), nn.GroupNorm(4, out)
        self.conv1, self.conv2 = nn.Conv2d(wide, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.time, self.skip = nn.Linear(16, out), nn.Conv2d(wide, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    """Down once, and up again, beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first, self.down, self.mid = nn.Conv2d(3, 8, 3, padding=1), Block(8, 16), Block(16, 16)
        self.attention, self.norm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LayerNorm(16)
        self.up, self.out = Block(24, 8), nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, x = self.time(t), self.first(x)
        y = self.mid(F.avg_pool2d(self.down(x, time), 2), time)
        tokens = self.norm(y.flatten(2).transpose(1, 2))
        y = y + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view_as(y)
        return self.out(self.up(torch.cat([x, F.interpolate(y, scale_factor=2)], 1), time))


class DiT(nn.Module):
    """One block of a diffusion transformer: norms without parameters, modulated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv2d(3, 16, 4, 4), nn.Linear(4, 16)
        self.norm1, self.norm2 = (nn.LayerNorm(16, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.modulation, self.attention = nn.Linear(16, 96), nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 16))
        self.last, self.out = nn.LayerNorm(16, elementwise_affine=False, eps=1e-6), nn.Linear(16, 48)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        a, b, c, d, e, f = self.modulation(F.silu(self.time(t)))[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + a) + b
        x = x + c * self.attention(y, y, y, need_weights=False)[0]
        return self.out(self.last(x + f * self.mlp(self.norm2(x) * (1 + d) + e)))


def norm_act() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), BatchNormAct(8, nn.ReLU(inplace=True)),
        nn.Conv2d(8, 8, 3, groups=8), BatchNormAct(8, nn.ReLU(inplace=True)),
        Standardizing(8, 16, 1), ChannelsNorm(16), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


class DenseNet(nn.Module):
    """BatchNorm before each convolution, which reads everything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * k) for k in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * k, 4, 3, padding=1, bias=False) for k in range(3))
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(F.relu(self.norms[3](x)).mean((2, 3)))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OWN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "UNet of diffusion": (UNet, (IMAGE, torch.tensor([[0.0, 1, 0, 1], [1.0, 0, 1, 0]]))),
    "DiT": (DiT, (IMAGE, torch.tensor([[0.0, 1, 0, 1], [1.0, 0, 1, 0]]))),
    "norm and activation in one": (norm_act, IMAGE),
    "DenseNet": (DenseNet, IMAGE),
    "torch.nn.Transformer": (
        lambda: nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True),
        (IMAGE.reshape(2, 12, 16), IMAGE.reshape(2, 12, 16)[:, :5]),
    ),
}
MODELS = [*CONFIGURED, *OWN]


def published(name: str, **sizes: Any) -> Any:
    """A model of transformers by its class, with random weights, from a configuration of these sizes."""
    import transformers

    if "backbone" in sizes:
        sizes["backbone_config"] = transformers.ResNetConfig(**sizes.pop("backbone"))
    config = re.sub("(ForCausalLM|LMHeadModel|EncoderModel|Model)$", "Config", name)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A small model with random weights, none of them as they start, in evaluation; and an input."""
    torch.manual_seed(0)
    if name in OWN:
        model, x = OWN[name][0]().eval(), OWN[name][1]
    else:
        model = published(f"{name}Model", **CONFIGURED[name]).eval()
        known = {"input_ids": torch.arange(12).view(2, 6), "pixel_values": torch.randn(2, 3, 64, 64, dtype=dtype)}
        x = {model.main_input_name: known.get(model.main_input_name, torch.randn(2, 800, dtype=dtype))}
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.add_(0.2 * torch.randn_like(tensor))
    return model.to(dtype), x


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    """What a model gives, in float64."""
    with torch.no_grad():
        return [part.double() for part in tensors_in(run_on(model, x)) if part.is_floating_point()]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of each output."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


class Verb(NamedTuple):
    """One verb as the table has it: what it does to a model, and whether the model computes what it did."""

    act: Callable[[nn.Module, Any], Changes]
    exact: bool = False


def _accepted(model: nn.Module, x: Any) -> Changes:
    """Conditioned weights, and the plain checkpoint loaded into them again."""
    with nk.surgery.plain(model):
        state = {key: value.clone() for key, value in model.state_dict().items()}
    changes = nk.condition(model, where="all", on_refusal="leave")
    with nk.surgery.plain(model):
        assert set(model.state_dict()) == set(state)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted, accepting = outputs(model, x), nk.surgery.accept(model)
    model.load_state_dict(state)
    assert apart(outputs(model, x), wanted) < 1e-5  # one more division of each weight by its norm
    accepting.undo()
    model.load_state_dict(before)
    return changes


def _grouped(model: nn.Module, x: Any) -> Changes:
    """Each parameter in one group; a row per group."""
    groups = nk.surgery.param_groups(model, 0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    rows = tuple(Change(group["name"], "", f"{len(group['params'])}") for group in groups)
    return Changes(model, rows, (), {}, lambda: model)


VERBS: dict[str, Verb] = {
    "accelerate": Verb(lambda model, x: nk.accelerate(model, example=x), True),
    "fold": Verb(nk.fold, True),
    "convert to rms": Verb(lambda model, x: nk.convert(model, "rms", example=x, on_refusal="leave")),
    "convert to gn": Verb(lambda model, x: nk.convert(model, "gn:gcd4", source="bn", example=x, on_refusal="leave")),
    "convert to sync": Verb(lambda model, x: nk.convert(model, "sync_bn", source="bn", on_refusal="leave"), True),
    "convert to frozen": Verb(lambda model, x: nk.convert(model, "frozen_bn", source="bn", on_refusal="leave"), True),
    "condition": Verb(lambda model, x: nk.condition(model, where="all", example=x, on_refusal="leave")),
    "recipe keep+wn": Verb(lambda model, x: nk.apply_recipe(model, "keep+wn", x, on_refusal="leave"), True),
    "drop biases": Verb(nk.surgery.drop_redundant_bias, True),
    "freeze": Verb(lambda model, x: nk.surgery.freeze(model), True),
    "recalibrate": Verb(lambda model, x: nk.recalibrate(model, [x], forward=run_on)),
    "adopt": Verb(lambda model, x: nk.surgery.adopt(model, "keras")),
    "plain, accept": Verb(_accepted),
    "param_groups": Verb(_grouped, True),
}


class Found(NamedTuple):
    """What a verb did to a model."""

    changed: int
    left: int
    error: float
    refused: str = ""


@functools.cache
def found(name: str, verb: str) -> Found:
    """Run a verb on a model, and undo it; everything must be back, bit for bit."""
    model, x = make(name)
    wanted = outputs(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    try:
        changes = VERBS[verb].act(model, x)
        error = apart(outputs(model, x), wanted)
        result = Found(len(changes.rows), len(changes.passed_over), error)
        assert changes.undo() is model
    except SurgeryError as refusal:
        result = Found(0, 0, 0.0, str(refusal))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert apart(outputs(model, x), wanted) == 0
    return result


def cell(result: Found) -> str:
    """How many were changed, and how many left."""
    return f"{result.changed}, {result.left} left" if result.left else str(result.changed or "–")


def table() -> str:
    """One row per model, one column per verb."""
    lines = [f"| model | {' | '.join(VERBS)} |", "|---" * (len(VERBS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(found(name, verb)) for verb in VERBS)} |" for name in MODELS]
    return "\n".join(lines) + f"\n\n{len(MODELS)} models, {len(VERBS)} verbs.\n"


def with_table(text: str) -> str:
    """The page with its table as it should be."""
    return _BLOCK.sub(lambda match: f"{match[1]}{table()}{match[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
