"""Every verb on models that no one here wrote: what is changed, how far the output moves, and that it is undone bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from normkit.surgery.changes import Changes
from normkit.surgery.watch import run_on, tensors_in

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
CONVOLVED = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
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
# The class's name without Model, its configuration, and how many norms accelerate takes over.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "Llama": (GROUPED, 3),
    "Mistral": (GROUPED, 3),
    "Qwen2": (GROUPED, 3),
    "Qwen3": ({**GROUPED, "head_dim": 8}, 5),
    "Gemma": ({**GROUPED, "head_dim": 8}, 3),
    "Gemma2": ({**GROUPED, "head_dim": 8}, 5),
    "Phi3": (GROUPED, 3),
    "Olmo": (GROUPED, 3),
    "Olmo2": (GROUPED, 5),
    "Cohere": (GROUPED, 2),
    "Mixtral": ({**GROUPED, "num_local_experts": 2}, 3),
    "Mamba": ({"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 64}, 2),
    "T5Encoder": (T5, 3),
    "Bert": (TEXT, 3),
    "ViT": (PATCHES, 3),
    "Dinov2": (PATCHES, 3),
    "ResNet": ({**CONVOLVED, "layer_type": "basic"}, 6),
    "RegNet": ({**CONVOLVED, "groups_width": 8}, 9),
    "ConvNextV2": (PYRAMID, 9),
    "Segformer": ({**PYRAMID, "num_attention_heads": [1, 2, 2, 2]}, 19),
    "Wav2Vec2": (SPEECH, 5),
}
VERBS: dict[str, Callable[[nn.Module, Any], Changes]] = {
    "accelerate": lambda model, x: nk.accelerate(model, example=x),
    "fold": nk.fold,
    "condition": lambda model, x: nk.condition(model, where="all", example=x, on_refusal="leave"),
    "convert": lambda model, x: nk.convert(model, "rms", example=x, on_refusal="leave"),
}


def _make(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**MODELS[name][0])
    model = getattr(transformers, f"{name}Model")(config).eval()
    for key, tensor in model.state_dict().items():  # not as they start
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.add_(0.2 * torch.randn_like(tensor))
    known = {"input_ids": torch.arange(12).view(2, 6), "pixel_values": torch.randn(2, 3, 64, 64, dtype=dtype)}
    return model.to(dtype), {model.main_input_name: known.get(model.main_input_name, torch.randn(2, 800, dtype=dtype))}


def _outputs(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return [part.double() for part in tensors_in(run_on(model, x)) if part.is_floating_point()]


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", MODELS)
def test_every_verb_on_models_that_people_run(name: str, verb: str) -> None:
    model, x = _make(name, torch.float32)
    wanted, state = _outputs(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    changes = VERBS[verb](model, x)
    error = _error(_outputs(model, x), wanted)
    if verb == "accelerate":
        assert (len(changes.rows), changes.passed_over) == (MODELS[name][1], ())
    if verb in ("accelerate", "fold"):
        assert error < 1e-5  # a few roundings of float32, through one block
        assert all(row.error is None or row.error < 1e-5 for row in changes)
    changes.undo()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert _error(_outputs(model, x), wanted) == 0


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Olmo2", "T5Encoder", "Cohere"])
def test_half_precision_rounds_where_it_did(name: str) -> None:
    model, x = _make(name, torch.bfloat16)
    wanted = copy.deepcopy(model)
    nk.accelerate(model, example=x)
    found = zip(_outputs(model, x), _outputs(wanted, x), strict=True)
    # Float32 statistics summed in another order now and then round to the neighbour.
    assert all(float((a == b).double().mean()) > 0.9 for a, b in found)
