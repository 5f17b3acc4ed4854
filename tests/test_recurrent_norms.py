"""Recurrent normalization of batches and layers: padding never enters, layers are unrolled cells, torch's without the norms."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from foreign_norms import random_, wired
from normkit import BatchNormLSTM, BatchNormRNN, LayerNormRecurrent, RecurrentBatchNorm
from normkit.core.errors import SurgeryError
from normkit.functional import padding_mask, recurrent_batch_norm

LENGTHS = torch.tensor([5, 2, 3, 4])


def _x(batch_first: bool = False) -> Tensor:
    """4 sequences of up to 5 steps and 3 features, NaN where padded."""
    x = torch.randn(4, 5, 3, dtype=torch.float64) * 2 + 3
    x[~padding_mask(LENGTHS, x, batch_first=True).squeeze(-1)] = torch.nan
    return x if batch_first else x.transpose(0, 1)


def _random(module: nn.Module) -> nn.Module:
    random_(module, mean=0.5)
    return module.double()


@pytest.mark.parametrize("batch_first", [True, False])
def test_sequence_statistics_are_those_of_the_real_frames_end_to_end(batch_first: bool) -> None:
    x, norm = _x(batch_first), _random(RecurrentBatchNorm(3, batch_first=batch_first))
    mask = padding_mask(LENGTHS, x, batch_first).squeeze(-1)
    frames, like = x[mask], nn.BatchNorm1d(3).double()
    like.load_state_dict(norm.state_dict(), strict=False)
    assert len(frames) == LENGTHS.sum()
    leaf = x.clone().requires_grad_()
    y = norm(leaf, lengths=LENGTHS)
    wanted = like(frames)
    assert_close(y[mask], wanted)
    assert (y[~mask] == 0).all()
    assert_close((norm.running_mean, norm.running_var), (like.running_mean, like.running_var))
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), leaf)
    assert gradient.isfinite().all()
    assert_close(norm.eval()(x, lengths=LENGTHS)[mask], like.eval()(frames))
    assert (norm(x, lengths=LENGTHS)[~mask] == 0).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_frame_statistics_are_those_of_each_steps_real_samples(batch_first: bool) -> None:
    x, norm = _x(batch_first), _random(RecurrentBatchNorm(3, "frame", 4, batch_first=batch_first))
    y = norm(x, lengths=LENGTHS)
    if batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    for t in range(5):
        like, real = nn.BatchNorm1d(3).double(), t < LENGTHS
        like.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
        if real.sum() == 1:  # one sample: its variance is undefined, and the running one stays
            assert_close(y[t, real], norm.bias.unsqueeze(0))
            continue
        assert_close(y[t, real], like(x[t, real]))
        if t < 4:
            assert_close((norm.running_mean[t], norm.running_var[t]), (like.running_mean, like.running_var))


def test_later_steps_reuse_the_last_statistics() -> None:
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    norm = _random(RecurrentBatchNorm(3, "frame", 2))
    norm(x)
    later = copy.deepcopy(norm)
    later(x[2:], start=2)
    assert_close(later.state_dict(), norm.state_dict())
    y = norm.eval()(x)
    for t in range(6):
        at = min(t, 1)
        like = F.batch_norm(x[t], norm.running_mean[at], norm.running_var[at], norm.weight, norm.bias)
        assert_close(y[t], like)
        assert_close(norm(x[t : t + 1], start=t)[0], like)


def test_the_function_is_the_layer() -> None:
    x = _x()
    for statistics in ("sequence", "frame"):
        norm = RecurrentBatchNorm(3, statistics, 5, gain=0.1).double()
        y = norm(x, lengths=LENGTHS)
        assert_close(recurrent_batch_norm(x, norm.weight, norm.bias, statistics=statistics, lengths=LENGTHS), y)
        assert_close(norm.weight.float(), torch.full((3,), 0.1))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_normalizes_its_input_alone(nonlinearity) -> None:
    model, x = _random(BatchNormRNN(3, 2, nonlinearity)), torch.randn(5, 4, 3, dtype=torch.float64)
    z = copy.deepcopy(model.norm)(model.input(x))
    like = nn.RNN(2, 2, nonlinearity=nonlinearity, bias=False).double()
    like.weight_hh_l0, like.weight_ih_l0 = model.hidden.weight, nn.Parameter(torch.eye(2, dtype=torch.float64))
    (y, h), (wanted, last) = model(x), like(z)
    assert_close(y, wanted)
    assert_close(h, last[0])


def _lstm_by_hand(model: BatchNormLSTM, x: Tensor) -> Tensor:
    def bn(norm: RecurrentBatchNorm, z: Tensor) -> Tensor:
        y = (z - z.mean(0)) / (z.var(0, correction=0) + norm.eps).sqrt()
        return F.linear(y, torch.diag(norm.weight), norm.bias)

    h = c = x.new_zeros(x.shape[1], 2)
    outputs = []
    for frame in x:
        gates = bn(model.hidden_norm, h @ model.hidden.weight.T) + bn(model.input_norm, frame @ model.input.weight.T)
        i, f, g, o = (gates + model.bias).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * bn(model.cell_norm, c).tanh()
        outputs.append(h)
    return torch.stack(outputs)


def test_lstm_is_the_papers() -> None:
    model, x = _random(BatchNormLSTM(3, 2, 4)), torch.randn(5, 4, 3, dtype=torch.float64)
    y, (h, _) = model(x)
    assert_close(y, _lstm_by_hand(model, x))
    assert_close(h, y[-1])
    first = copy.deepcopy(model)
    first.batch_first = True
    assert_close(first(x.transpose(0, 1))[0].transpose(0, 1), y)


@pytest.mark.parametrize("make", [lambda: BatchNormLSTM(3, 2, 5), lambda: BatchNormRNN(3, 2)])
def test_padding_changes_nothing(make) -> None:
    model, x = _random(make()), _x().nan_to_num()
    x[:, 1] = 0
    lengths = torch.tensor([5, 5, 5, 3])
    longer = torch.cat([x, torch.full((2, 4, 3), torch.inf, dtype=x.dtype)])
    longer[3:, 3] = torch.nan
    like = copy.deepcopy(model)
    y, state = model(longer, lengths=lengths)
    wanted, other = like(torch.where(torch.isfinite(longer[:5]), longer[:5], 7.0), lengths=lengths)
    assert_close(y[:5], wanted)
    assert (y[5:] == 0).all()
    assert_close(state, other)
    assert_close(model.state_dict(), like.state_dict())
    last = state[0] if isinstance(state, tuple) else state
    assert_close(last[3], y[2, 3])


CELLS = ["lstm", "gru", "rnn"]


def bypass(cell: nn.Module) -> None:
    """Leaves of each norm its bias."""
    for module in list(cell.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, wired(lambda self, x: x + self.bias, bias=child.bias))


# torch's update gate opens to the old value, ours to the new one.
TURNED = torch.ones(15, 1, dtype=torch.float64).index_fill(0, torch.arange(5, 10), -1)
TWINS = {
    "lstm": (nk.LayerNormLSTMCell(3, 5), nn.LSTMCell(3, 5), 1.0),
    "gru": (nk.LayerNormGRUCell(3, 5), nn.GRUCell(3, 5, bias=False), TURNED),
    "tanh": (nk.LayerNormRNNCell(3, 5), nn.RNNCell(3, 5, bias=False), 1.0),
    "relu": (
        nk.LayerNormRNNCell(3, 5, nonlinearity="relu"), nn.RNNCell(3, 5, bias=False, nonlinearity="relu"), 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "turned"), TWINS.values(), ids=TWINS)
def test_without_its_norms_a_cell_is_torchs(ours: Any, theirs: Any, turned: Any) -> None:
    ours, theirs = ours.double(), theirs.double()
    bypass(ours)
    with torch.no_grad():
        ours.weight_ih.copy_(theirs.weight_ih * turned)
        ours.weight_hh.copy_(theirs.weight_hh * turned)
        if theirs.bias_ih is not None:
            ours.bias.copy_(theirs.bias_ih + theirs.bias_hh)
    x, state = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    given = tuple(state) if isinstance(theirs, nn.LSTMCell) else state[0]
    assert_close(ours(x, given), theirs(x, given), rtol=1e-12, atol=1e-12)
    assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_layer_is_its_cells_step_by_step(cell: str, batch_first: bool) -> None:
    layer = LayerNormRecurrent(3, 5, cell, num_layers=2, batch_first=batch_first).double()
    random_(layer)
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
    random_(layer)
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
    kept = [p for key, p in held.items() if "weight" in key and "head" not in key]
    assert (cell == "gru") == all(old is not p for old in kept for p in now.values())
    assert (model(x) - wanted).abs().max() > 1e-3
    bypass(model.layer)
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
