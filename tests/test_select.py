"""Layers by their places, and rows and columns of every layer's weight."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

from foreign_norms import Conv1D
from normkit.core.errors import OptionError
from normkit.core.support import Support
from normkit.surgery.select import select, weight_names
from normkit.weights.layout import WeightLayout, weight_layout, weight_of


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


def test_a_module_in_two_places_or_at_both_ends_counts_once():
    shared = nn.Linear(4, 4)
    assert list(select(nn.Sequential(shared, nn.ReLU(), shared))) == ["0"]
    assert list(select(nn.Linear(2, 2), "first_last")) == [""]


def test_parametrized_layers_count_and_their_insides_do_not():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert list(select(model, lambda name, module: True)) == ["0", "1"]
    u = model[0].parametrizations.weight[0]._u.clone()
    select(model, "re:.")
    torch.testing.assert_close(model[0].parametrizations.weight[0]._u, u, rtol=0, atol=0)  # looking must not iterate


def test_attention_with_other_sizes_has_three_weights():
    assert weight_names(nn.MultiheadAttention(8, 2, kdim=4)) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")


LAYERS = {
    "linear": (nn.Linear(5, 4), (5,)),
    "conv": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 4, 4)),
    "grouped conv": (nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular"), (4, 4, 4)),
    "depthwise conv": (nn.Conv1d(3, 6, 3, padding=1, groups=3, padding_mode="circular"), (3, 5)),
    "transposed conv": (nn.ConvTranspose1d(3, 4, 1), (3, 5)),
    "grouped transposed conv": (nn.ConvTranspose1d(4, 6, 1, groups=2), (4, 5)),
    "gpt-2 conv": (Conv1D(4, 5), (5,)),
}


def norms(weight: Tensor, support: Support) -> Tensor:
    split = support.split(weight.shape)
    return torch.linalg.vector_norm(weight.detach().reshape(split.shape), dim=split.dims).flatten()


def operator(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The layer as a matrix: outputs (channel, position) x inputs (channel, position)."""
    count = torch.Size(shape).numel()
    inputs = torch.eye(count).view(count, *shape)
    with torch.no_grad():
        return (layer(inputs) - layer(torch.zeros(1, *shape))).flatten(1).T


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_rows_and_columns_are_those_of_the_operator(layer, shape) -> None:
    matrix, layout = operator(layer, shape), weight_layout(layer)
    positions = torch.Size(shape[1:]).numel()
    # float32 sums of up to 36 products.
    rows = torch.linalg.vector_norm(matrix, dim=1).unflatten(0, (-1, positions))
    assert_close(rows, norms(layer.weight, layout.rows).unsqueeze(1).expand_as(rows), rtol=1e-5, atol=1e-6)
    columns = torch.linalg.vector_norm(matrix, dim=0).unflatten(0, (-1, positions))
    assert_close(columns, norms(layer.weight, layout.columns()).unsqueeze(1).expand_as(columns), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_unfolding_has_the_rows_and_the_unfolded_columns(layer, shape) -> None:
    layout = weight_layout(layer)
    matrix = layout.matrix(layer.weight.detach())
    assert_close(torch.linalg.vector_norm(matrix, dim=1), norms(layer.weight, layout.rows))
    if layout.groups == 1:
        columns = norms(layer.weight, layout.columns("unfold"))
        assert_close(torch.linalg.vector_norm(matrix, dim=0).sort().values, columns.sort().values)


def test_layouts_of_parametrized_layers_of_attention_and_of_others() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, groups=2))
    assert weight_layout(layer) == WeightLayout(output_axis=1, groups=2)
    attention = nn.MultiheadAttention(4, 2)  # which stacks three matrices
    assert weight_layout(attention, "in_proj_weight").columns().split((12, 4)).shape == (3, 4, 4)
    others = (attention.out_proj, "weight"), (nn.LSTM(3, 4), "weight_hh_l0"), (nn.Bilinear(2, 3, 4), "weight")
    assert {weight_layout(*other) for other in others} == {WeightLayout()}  # outputs first
    assert weight_layout(nn.Embedding(7, 3)).rows == Support("o *", over="*")


def test_faults_say_what_is_there() -> None:
    module = nn.Module()
    module.register_buffer("weight", torch.arange(3))
    with pytest.raises(OptionError, match=r"torch.int64; wanted a floating dtype"):
        weight_of(module, "weight", "here")
