"""Oracles of the layer family: the papers' formulas, token by token, from the parameters that the layer holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from itertools import product
from typing import Any

import torch
from torch import Tensor

# For a method that is not one rule: its training output, given the layer (for its parameters and buffers) and its inputs,
# by loops or formulas of the paper, and by none of the code that it judges.
ORACLES: dict[str, Callable[..., Tensor]] = {}


def oracle(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Enters an oracle under its method's name."""
    ORACLES[function.__name__] = function
    return function


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rows = [sum((w * v for w, v in zip(row, x, strict=True)), torch.zeros((), dtype=x.dtype)) for row in weight]
    return torch.stack(rows) + (0 if bias is None else bias)


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    values = x.tolist()
    mean = math.fsum(values) / len(values)
    var = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return torch.tensor([(v - mean) / math.sqrt(var + eps) for v in values], dtype=x.dtype)


def of_tokens(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a function of one token and its sample's other inputs, that of every token of (N, L, D)."""

    @wraps(function)
    def every(made: Any, x: Tensor, *others: Tensor) -> Tensor:
        samples = zip(x, *others, strict=True)
        whole = [torch.stack([function(made, token, *rest) for token in sample]) for sample, *rest in samples]
        return torch.stack(whole)

    return every


def _modulation(made: Any, condition: Tensor) -> Tensor:
    linear = made.adaLN_modulation[1]
    return _linear(linear.weight, linear.bias, condition / (1 + (-condition).exp()))


@oracle
@of_tokens
def adaptive_layer_norm(made: Any, token: Tensor, condition: Tensor) -> Tensor:
    shift, scale = _modulation(made, condition).split(len(token))
    return _layer_norm(token, made.eps) * (1 + scale) + shift


@oracle
@of_tokens
def adaptive_layer_norm_zero(made: Any, token: Tensor, condition: Tensor) -> Tensor:
    found = _modulation(made, condition).split(len(token))
    for shift, scale, gate in (found[:3], found[3:]):
        token = token + gate * torch.tanh(_layer_norm(token, made.eps) * (1 + scale) + shift)
    return token


@oracle
def film(made: Any, x: Tensor, condition: Tensor) -> Tensor:
    y = x.clone()
    for n in range(len(x)):
        found = _linear(made.linear.weight, made.linear.bias, condition[n])
        for c in range(x.shape[1]):
            y[n, c] = (1 + found[c]) * x[n, c] + found[x.shape[1] + c]
    return y


@oracle
@of_tokens
def fix_norm(made: Any, token: Tensor) -> Tensor:
    cosines = []
    for row in made.weight.tolist():
        dot = math.fsum(a * b for a, b in zip(row, token.tolist(), strict=True))
        cosines.append(dot / math.hypot(*row) / math.hypot(*token.tolist()))
    return made.gain * token.new_tensor(cosines) + made.bias


@oracle
@of_tokens
def partial_rms_norm(made: Any, token: Tensor) -> Tensor:
    first = token.tolist()[: int(made.features * made.fraction)]
    return made.weight * token / (math.hypot(*first) / math.sqrt(len(first)) + made.eps)


@oracle
@of_tokens
def dynamic_erf(made: Any, token: Tensor) -> Tensor:
    squashed = [math.erf(made.alpha.item() * v + made.shift.item()) for v in token.tolist()]
    return made.weight * token.new_tensor(squashed) + made.bias


@oracle
@of_tokens
def seed_norm(made: Any, token: Tensor) -> Tensor:
    inner = math.fsum(v * b for v, b in zip(token.tolist(), made.beta.tolist(), strict=True))
    rms = math.sqrt(math.fsum(v * v for v in token.tolist()) / len(token) + made.eps)
    return (math.tanh(inner) * made.alpha + made.weight) * token / rms


@oracle
def gated_rms_norm(made: Any, x: Tensor, gate: Tensor) -> Tensor:
    y, size = torch.empty_like(x), made.features // made.groups
    for n, t, g in product(*map(range, x.shape[:2]), range(made.groups)):
        part = slice(g * size, (g + 1) * size)
        silu = [v / (1 + math.exp(-v)) for v in gate[n, t, part].tolist()]
        values = x[n, t, part].tolist()
        before = values if made.norm_before_gate else [v * s for v, s in zip(values, silu, strict=True)]
        rms = math.sqrt(math.fsum(v * v for v in before) / size + made.eps)
        after = silu if made.norm_before_gate else [1.0] * size
        y[n, t, part] = made.weight[part] * x.new_tensor([v * s / rms for v, s in zip(before, after, strict=True)])
    return y


@oracle
@of_tokens
def query_key_norm(made: Any, token: Tensor, key: Tensor, value: Tensor) -> Tensor:
    gain, q = made.q_norm.weight.item(), token.tolist()
    dots = [math.fsum(a * b for a, b in zip(q, k, strict=True)) / math.hypot(*q) / math.hypot(*k) for k in key.tolist()]
    parts = [math.exp(gain * dot) for dot in dots]
    return sum((part / math.fsum(parts) * v for part, v in zip(parts, value, strict=True)), torch.zeros_like(token))


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def _normed(norm: Any, x: Tensor) -> Tensor:
    return _layer_norm(x, norm.eps) * norm.weight + norm.bias


def _steps(made: Any, x: Tensor, step: Callable[..., tuple[Tensor, ...]]) -> Tensor:
    """Each sample and time step by itself, through the layer's one cell."""
    cell, y = made.cells[0], []
    for sample in x:
        state: tuple[Tensor, ...] = (torch.zeros(cell.hidden_size, dtype=x.dtype),) * 2
        outputs = []
        for token in sample:
            state = step(cell, token, *state)
            outputs.append(state[0])
        y.append(torch.stack(outputs))
    return torch.stack(y)


@oracle
def layer_norm_rnn(made: Any, x: Tensor) -> Tensor:
    def step(cell: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(_normed(cell.norm, _linear(cell.weight_ih, None, x) + _linear(cell.weight_hh, None, h))), c

    return _steps(made, x, step)


@oracle
def layer_norm_lstm(made: Any, x: Tensor) -> Tensor:
    def step(cell: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        before = _normed(cell.norm_hh, _linear(cell.weight_hh, None, h))
        gates = before + _normed(cell.norm_ih, _linear(cell.weight_ih, None, x)) + cell.bias
        i, f, g, o = gates.split(len(h))
        c = _sigmoid(f) * c + _sigmoid(i) * torch.tanh(g)
        return _sigmoid(o) * torch.tanh(_normed(cell.norm_c, c)), c

    return _steps(made, x, step)


@oracle
def layer_norm_gru(made: Any, x: Tensor) -> Tensor:
    def step(cell: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        d = len(h)
        from_x, from_h = _linear(cell.weight_ih, None, x), _linear(cell.weight_hh, None, h)
        r, z = _sigmoid(_normed(cell.norm_hh, from_h[: 2 * d]) + _normed(cell.norm_ih, from_x[: 2 * d])).split(d)
        n = torch.tanh(_normed(cell.norm_in, from_x[2 * d :]) + r * _normed(cell.norm_hn, from_h[2 * d :]))
        return (1 - z) * h + z * n, c

    return _steps(made, x, step)


@oracle
@of_tokens
def preconditioned_attention(made: Any, token: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = ((token * key).sum(-1) / math.sqrt(len(token))).exp()
    row = (weights[:, None] * value).sum(0) / weights.sum()
    return row / row.square().sum().sqrt()


@oracle
def conditioned_tokens(made: Any, x: Tensor) -> Tensor:
    """By the polar factor U V^T = X (X^T X)^(-1/2), from eigenvalues of X^T X."""
    y = []
    for sample in x:
        squares, vectors = torch.linalg.eigh(sample.T @ sample)
        polar = sample @ vectors @ torch.diag(squares.clamp_min(0).rsqrt()) @ vectors.T
        y.append(sample.to(torch.float64) + squares.max().sqrt() * polar)
    return torch.stack(y)


@oracle
def hypersphere_residual(made: Any, x: Tensor, branch: Tensor) -> Tensor:
    y, rate = torch.empty_like(x), made.rate.weight * 0.05 * math.sqrt(made.features)
    for at in product(*map(range, x.shape[:2])):
        moved = x[at] + rate * (branch[at] / math.hypot(*branch[at].tolist()) - x[at])
        y[at] = moved / math.hypot(*moved.tolist())
    return y
