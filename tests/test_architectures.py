"""Every verb on models that no one here wrote: what is changed, how far the output moves, and that it is undone bit for bit."""

import copy
import importlib.util

import pytest
import torch

import architectures
import normkit as nk
from architectures import MODELS, VERBS, found, make, outputs

_WITHOUT = importlib.util.find_spec("transformers") is None
pytestmark = pytest.mark.skipif(_WITHOUT, reason="transformers is not installed")

# How many norms accelerate takes over: all, but for frozen ones.
NORMS = {
    "Llama": 3, "Mistral": 3, "Qwen2": 3, "Qwen3": 5, "Gemma": 3, "Gemma2": 5, "Phi3": 3, "Olmo": 3, "Olmo2": 5, "Cohere": 2,
    "Mixtral": 3, "Mamba": 2, "T5Encoder": 3, "Bert": 3, "ViT": 3, "Dinov2": 3, "ResNet": 6, "RegNet": 9, "ConvNextV2": 9,
    "Segformer": 19, "Wav2Vec2": 5, "Detr": 6, "UNet of diffusion": 8, "DiT": 3, "norm and activation in one": 3, "DenseNet": 4,
    "torch.nn.Transformer": 7,
}  # fmt: skip


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


def test_the_table_of_verbs_is_current() -> None:
    text = architectures.PAGE.read_text()
    assert architectures.with_table(text) == text, "run: python tests/architectures.py"


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Olmo2", "T5Encoder", "Cohere"])
def test_half_precision_rounds_where_it_did(name: str) -> None:
    model, x = make(name, torch.bfloat16)
    wanted = copy.deepcopy(model)
    nk.accelerate(model, example=x)
    pairs = zip(outputs(model, x), outputs(wanted, x), strict=True)
    # Float32 statistics summed in another order now and then round to the neighbour.
    assert all(float((a == b).double().mean()) > 0.9 for a, b in pairs)
