"""The encoder against torch's own layers, its placements, and its heads."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.lab.data.sequences import TASKS, draw, guess, text
from normkit.lab.models.vit import Encoder


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_it_equals_the_layers_of_torch(placement: str) -> None:
    torch.manual_seed(0)
    ours = Encoder(11, 7, features=12, depth=2, heads=3, placement=placement).double().eval()
    theirs = nn.ModuleList(
        nn.TransformerEncoderLayer(12, 3, 48, 0.0, batch_first=True, norm_first=placement == "pre") for _ in range(2)
    )
    for k, layer in enumerate(theirs.double().eval()):
        attention, feed = ours.layers[2 * k], ours.layers[2 * k + 1]
        layer.self_attn.load_state_dict(
            {
                "in_proj_weight": attention.sublayer.qkv.weight,
                "in_proj_bias": attention.sublayer.qkv.bias,
                "out_proj.weight": attention.sublayer.proj.weight,
                "out_proj.bias": attention.sublayer.proj.bias,
            }
        )
        layer.linear1.load_state_dict(feed.sublayer[0].state_dict())
        layer.linear2.load_state_dict(feed.sublayer[2].state_dict())
    tokens = torch.randint(11, (2, 7))
    x = (ours.words(tokens) + ours.places) / 2**0.5
    for layer in theirs:
        x = layer(x)
    assert ours.head is not None
    expected = ours.head(x if placement == "post" else nn.functional.layer_norm(x, (12,)))
    assert_close(ours(tokens), expected)


def test_a_causal_encoder_sees_nothing_of_what_follows() -> None:
    model = Encoder(11, 7, features=8, depth=2, heads=2, causal=True)
    tokens = torch.randint(11, (1, 7))
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    assert_close(model(tokens)[:, :4], model(other)[:, :4])


@pytest.mark.parametrize("norm", ["ln", "rms", "scale"])
@pytest.mark.parametrize("fix", [False, True])
def test_every_norm_and_head_trains(norm: str, fix: bool) -> None:
    model = Encoder(11, 7, features=8, depth=1, heads=2, norm=norm, fix=fix, placement="pre")
    model(torch.randint(11, (2, 7))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(OptionError, match="heads"):
        Encoder(11, 7, features=8, heads=3)
    with pytest.raises(OptionError, match="norm"):
        Encoder(11, 7, features=8, norm="bn")
    with pytest.raises(OptionError, match="no task"):
        draw("reverse", 1, 4)


@pytest.mark.parametrize("task", TASKS)
def test_sequences_and_targets_have_one_shape(task: str) -> None:
    torch.manual_seed(1)
    tokens, targets = draw(task, 5, 9)
    assert tokens.shape == targets.shape == (5, 9)
    torch.manual_seed(1)
    assert_close(draw(task, 5, 9), (tokens, targets))
    assert 0 < guess(task) < 5


def test_the_targets_are_what_the_tasks_say() -> None:
    tokens, targets = draw("add", 3, 4, vocabulary=5)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert wanted == [(row[k] + row[k - 1]) % 5 for k in range(4)]
    tokens, targets = draw("text", 2, 30)
    assert_close(tokens[:, 1:], targets[:, :-1])
    codes, characters = text()
    passage = "".join(characters[code] for code in tokens[0])
    assert passage in "".join(characters[code] for code in codes)
