import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from foreign_norms import Conv1D
from normkit.surgery.select import select, weight_names


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm((8, 4, 4))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.mix = Conv1D(8, 8)
        self.head = nn.Linear(8, 2)


ALL = ["stem", "attention", "attention.out_proj", "up", "mix", "head"]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("all", ALL),
        ("first_last", ["stem", "head"]),
        ("hidden", ALL[1:-1]),
        ("convolutions", ["stem", "up"]),
        ("re:^(stem|emb)", ["embedding", "stem"]),
        ("re:proj$", ["attention.out_proj"]),
        (lambda name, module: isinstance(module, nn.Embedding) or name == "mix", ["embedding", "mix"]),
    ],
)
def test_places(where, names):
    assert list(select(Mixed(), where)) == names


def test_a_module_in_two_places_counts_once():
    shared = nn.Linear(4, 4)
    assert list(select(nn.Sequential(shared, nn.ReLU(), shared))) == ["0"]


def test_a_single_layer_is_first_and_last_once():
    assert list(select(nn.Linear(2, 2), "first_last")) == [""]


def test_parametrized_layers_count_and_their_insides_do_not():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert list(select(model, lambda name, module: True)) == ["0", "1"]
    u = model[0].parametrizations.weight[0]._u.clone()
    select(model, "re:.")
    torch.testing.assert_close(model[0].parametrizations.weight[0]._u, u, rtol=0, atol=0)  # looking must not iterate


def test_attention_with_other_sizes_has_three_weights():
    assert weight_names(nn.MultiheadAttention(8, 2, kdim=4)) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")
