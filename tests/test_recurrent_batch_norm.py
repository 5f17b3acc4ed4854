"""Recurrent batch normalization: padding never enters, each step has its own statistics, gains keep gates open."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from normkit import BatchNormLSTM, BatchNormRNN, RecurrentBatchNorm
from normkit.functional import padding_mask, recurrent_batch_norm

LENGTHS = torch.tensor([5, 2, 3, 4])


def _x(batch_first: bool = False) -> Tensor:
    """4 sequences of up to 5 steps and 3 features, NaN where padded."""
    x = torch.randn(4, 5, 3, dtype=torch.float64) * 2 + 3
    x[~padding_mask(LENGTHS, x, batch_first=True).squeeze(-1)] = torch.nan
    return x if batch_first else x.transpose(0, 1)


def _random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5)
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


def test_function_and_reset() -> None:
    x = _x()
    for statistics in ("sequence", "frame"):
        norm = RecurrentBatchNorm(3, statistics, 5, gain=0.1).double()
        y = norm(x, lengths=LENGTHS)
        assert_close(recurrent_batch_norm(x, norm.weight, norm.bias, statistics=statistics, lengths=LENGTHS), y)
        norm.reset_parameters()
        assert_close(norm.state_dict(), RecurrentBatchNorm(3, statistics, 5, gain=0.1).double().state_dict())
        assert (norm.weight == 0.1).all()


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
