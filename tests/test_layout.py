"""Rows and columns of every layer's weight, against the layer's matrix found by pushing unit inputs through it."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from foreign_norms import Conv1D
from normkit.core.errors import OptionError
from normkit.core.support import Support
from normkit.weights.layout import WeightLayout, weight_layout, weight_of

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


def test_parametrized_layers_keep_their_layout() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, groups=2))
    assert weight_layout(layer) == WeightLayout(output_axis=1, groups=2)


def test_attention_stacks_three_matrices() -> None:
    layout = weight_layout(nn.MultiheadAttention(4, 2), "in_proj_weight")
    assert layout.columns().split((12, 4)).shape == (3, 4, 4)
    assert weight_layout(nn.MultiheadAttention(4, 2).out_proj) == WeightLayout()


def test_any_other_weight_counts_outputs_first() -> None:
    assert weight_layout(nn.LSTM(3, 4), "weight_hh_l0") == weight_layout(nn.Bilinear(2, 3, 4)) == WeightLayout()
    assert weight_layout(nn.Embedding(7, 3)).rows == Support("o *", over="*")


def test_faults_say_what_is_there() -> None:
    module = nn.Module()
    module.register_buffer("weight", torch.arange(3))
    with pytest.raises(OptionError, match=r"torch.int64; wanted a floating dtype"):
        weight_of(module, "weight", "here")
