"""Recurrent layer normalization: torch's cells where the norms are bypassed, layers as unrolled cells, padding."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit import LayerNormGRUCell, LayerNormLSTMCell, LayerNormRecurrent, LayerNormRNNCell
from normkit.core.errors import SurgeryError

CELLS = ["lstm", "gru", "rnn"]


def bypass(cell: nn.Module) -> None:
    for name, child in list(cell.named_children()):
        if isinstance(child, nn.LayerNorm):
            setattr(cell, name, nn.Identity())


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)


def test_without_its_norms_the_lstm_is_torchs() -> None:
    ours, theirs = LayerNormLSTMCell(3, 5).double(), nn.LSTMCell(3, 5).double()
    bypass(ours)
    with torch.no_grad():
        ours.weight_ih.copy_(theirs.weight_ih)
        ours.weight_hh.copy_(theirs.weight_hh)
        ours.bias.copy_(theirs.bias_ih + theirs.bias_hh)
    x, state = torch.randn(4, 3, dtype=torch.float64), tuple(torch.randn(2, 4, 5, dtype=torch.float64))
    assert_close(ours(x, state), theirs(x, state), rtol=1e-12, atol=1e-12)
    assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_without_its_norms_the_gru_is_torchs_with_z_turned() -> None:
    ours, theirs = LayerNormGRUCell(3, 5).double(), nn.GRUCell(3, 5, bias=False).double()
    bypass(ours)
    turn = torch.ones(15, 1, dtype=torch.float64)
    turn[5:10] = -1
    with torch.no_grad():
        ours.weight_ih.copy_(theirs.weight_ih * turn)
        ours.weight_hh.copy_(theirs.weight_hh * turn)
    x, h = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert_close(ours(x, h), theirs(x, h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_without_its_norm_the_rnn_is_torchs(nonlinearity: str) -> None:
    ours = LayerNormRNNCell(3, 5, nonlinearity=nonlinearity).double()
    theirs = nn.RNNCell(3, 5, bias=False, nonlinearity=nonlinearity).double()
    bypass(ours)
    ours.load_state_dict(theirs.state_dict())
    x, h = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert_close(ours(x, h), theirs(x, h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_layer_is_its_cells_step_by_step(cell: str, batch_first: bool) -> None:
    layer = LayerNormRecurrent(3, 5, cell, num_layers=2, batch_first=batch_first).double()
    randomize(layer)
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    count = 2 if cell == "lstm" else 1
    start = tuple(torch.randn(2, 4, 5, dtype=torch.float64) for _ in range(count))
    states = [tuple(s[k] for s in start) for k in range(2)]
    wanted = []
    for token in x:
        for k in range(2):
            after = layer.cells[k](token, states[k])
            states[k] = after if isinstance(after, tuple) else (after,)
            token = states[k][0]
        wanted.append(token)
    last = tuple(torch.stack(each) for each in zip(*states, strict=True))
    y, state = layer(x.transpose(0, 1) if batch_first else x, start if count > 1 else start[0])
    assert_close(y.transpose(0, 1) if batch_first else y, torch.stack(wanted), rtol=1e-9, atol=1e-9)
    assert_close(state, last if count > 1 else last[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_neither_output_nor_state(cell: str) -> None:
    layer = LayerNormRecurrent(3, 5, cell, num_layers=2, batch_first=True).double()
    randomize(layer)
    x, lengths = torch.randn(3, 6, 3, dtype=torch.float64), torch.tensor([6, 2, 4])
    mask = torch.arange(6) < lengths[:, None]
    y, state = layer(torch.where(mask[..., None], x, 1e9), mask=mask)
    for n, length in enumerate(lengths.tolist()):
        alone, last = layer(x[n : n + 1, :length])
        assert_close(y[n : n + 1, :length], alone)
        assert (y[n, length:] == 0).all()
        for found, wanted in zip(state if cell == "lstm" else [state], last if cell == "lstm" else [last], strict=True):
            assert_close(found[:, n : n + 1], wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_one_sequence_without_a_batch(cell: str) -> None:
    layer = LayerNormRecurrent(3, 5, cell, batch_first=True)
    x = torch.randn(6, 3)
    y, _ = layer(x)
    assert_close(y, layer(x[None])[0][0])


class _Biased(nn.Module):
    """What a norm leaves of its input when it does not normalize."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


class _Tagger(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layer, nn.RNNBase | LayerNormRecurrent):
            self.layer.flatten_parameters()
            return self.head(self.layer(x)[0])
        h = self.layer(x[0])
        return self.head(h[0] if isinstance(h, tuple) else h)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["layer", "cell"])
@pytest.mark.parametrize("cell", CELLS)
def test_torchs_layers_are_converted_with_their_weights(cell: str, kind: str, bias: bool) -> None:
    word = cell.upper()
    options = {"num_layers": 2, "batch_first": True} if kind == "layer" else {}
    layer = getattr(nn, word + ("Cell" if kind == "cell" else ""))(3, 5, bias=bias, **options)
    model, x = _Tagger(layer).double(), torch.randn(4, 7, 3, dtype=torch.float64)
    wanted, held = model(x), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    changes = nk.convert(model, f"layer_norm_{cell}", example=x, optimizer=optimizer)
    assert [(row.layer, "weights carried over" in row.note) for row in changes] == [("layer", True)]
    now = dict(model.named_parameters())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in now.values()}
    assert (cell == "gru") == all(
        held[key] is not p for key in held for p in now.values() if "weight" in key and "head" not in key
    )
    assert (model(x) - wanted).abs().max() > 1e-3
    for module in list(model.layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, _Biased(child.bias))
    assert_close(model(x), wanted)
    fresh = _Tagger(layer)
    undone = nk.convert(fresh, f"layer_norm_{cell}").undo()
    assert undone.layer is layer
    assert list(dict(fresh.named_parameters())) == list(held)


def test_recurrent_layers_that_have_no_counterpart_are_refused() -> None:
    for option in ({"bidirectional": True}, {"proj_size": 2}, {"dropout": 0.5, "num_layers": 2}):
        with pytest.raises(SurgeryError, match=f"{next(iter(option))}.*which layer_norm_lstm has no place for"):
            nk.convert(nn.LSTM(3, 5, **option), "layer_norm_lstm")
        left = nk.convert(nn.Sequential(nn.LSTM(3, 5, **option)), "layer_norm_lstm", on_refusal="leave")
        assert len(left.passed_over) == 1
    with pytest.raises(SurgeryError, match="no GRU and no GRUCell"):
        nk.convert(nn.LSTM(3, 5), "layer_norm_gru")
    assert isinstance(nk.convert(nn.LSTM(3, 5), "layer_norm_lstm").model, LayerNormRecurrent)
    with pytest.raises(SurgeryError, match="bake them in"):
        nk.convert(nk.condition(nn.LSTM(3, 5), where="all").model, "layer_norm_lstm")
