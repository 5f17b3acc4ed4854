"""Oracles of the layer family: the papers' formulas, token by token, from the parameters that the layer holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rows = [sum((w * v for w, v in zip(row, x, strict=True)), torch.zeros((), dtype=x.dtype)) for row in weight]
    return torch.stack(rows) + (0 if bias is None else bias)


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    values = x.tolist()
    mean = math.fsum(values) / len(values)
    var = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return torch.tensor([(v - mean) / math.sqrt(var + eps) for v in values], dtype=x.dtype)


def _tokens(x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    """``function(sample, token)`` for every token of (N, L, D)."""
    return torch.stack([torch.stack([function(n, token) for token in sample]) for n, sample in enumerate(x)])


def _modulation(made: Any, condition: Tensor) -> Tensor:
    linear = made.adaLN_modulation[1]
    return _linear(linear.weight, linear.bias, condition / (1 + (-condition).exp()))


def adaptive_layer_norm(made: Any, x: Tensor, condition: Tensor) -> Tensor:
    def token(n: int, token: Tensor) -> Tensor:
        found = _modulation(made, condition[n])
        d = len(token)
        return _layer_norm(token, made.eps) * (1 + found[d:]) + found[:d]

    return _tokens(x, token)


def adaptive_layer_norm_zero(made: Any, x: Tensor, condition: Tensor) -> Tensor:
    def token(n: int, token: Tensor) -> Tensor:
        d = len(token)
        found = _modulation(made, condition[n]).split(d)
        for shift, scale, gate in (found[:3], found[3:]):
            token = token + gate * torch.tanh(_layer_norm(token, made.eps) * (1 + scale) + shift)
        return token

    return _tokens(x, token)


def film(made: Any, x: Tensor, condition: Tensor) -> Tensor:
    y = x.clone()
    for n in range(len(x)):
        found = _linear(made.linear.weight, made.linear.bias, condition[n])
        for c in range(x.shape[1]):
            y[n, c] = (1 + found[c]) * x[n, c] + found[x.shape[1] + c]
    return y


def fix_norm(made: Any, x: Tensor) -> Tensor:
    def token(n: int, token: Tensor) -> Tensor:
        cosines = []
        for row in made.weight.tolist():
            dot = math.fsum(a * b for a, b in zip(row, token.tolist(), strict=True))
            cosines.append(dot / math.hypot(*row) / math.hypot(*token.tolist()))
        return made.gain * torch.tensor(cosines, dtype=x.dtype) + made.bias

    return _tokens(x, token)


def partial_rms_norm(made: Any, x: Tensor) -> Tensor:
    def token(n: int, token: Tensor) -> Tensor:
        first = token.tolist()[: int(made.features * made.fraction)]
        return made.weight * token / (math.hypot(*first) / math.sqrt(len(first)) + made.eps)

    return _tokens(x, token)


def dynamic_erf(made: Any, x: Tensor) -> Tensor:
    def token(n: int, token: Tensor) -> Tensor:
        squashed = [math.erf(made.alpha.item() * v + made.shift.item()) for v in token.tolist()]
        return made.weight * torch.tensor(squashed, dtype=x.dtype) + made.bias

    return _tokens(x, token)


def seed_norm(made: Any, x: Tensor) -> Tensor:
    def token(n: int, token: Tensor) -> Tensor:
        inner = math.fsum(v * b for v, b in zip(token.tolist(), made.beta.tolist(), strict=True))
        rms = math.sqrt(math.fsum(v * v for v in token.tolist()) / len(token) + made.eps)
        return (math.tanh(inner) * made.alpha + made.weight) * token / rms

    return _tokens(x, token)


def gated_rms_norm(made: Any, x: Tensor, gate: Tensor) -> Tensor:
    y, size = torch.empty_like(x), made.features // made.groups
    for n, t, g in product(*map(range, x.shape[:2]), range(made.groups)):
        part = slice(g * size, (g + 1) * size)
        silu = [v / (1 + math.exp(-v)) for v in gate[n, t, part].tolist()]
        values = x[n, t, part].tolist()
        before = values if made.norm_before_gate else [v * s for v, s in zip(values, silu, strict=True)]
        rms = math.sqrt(math.fsum(v * v for v in before) / size + made.eps)
        after = silu if made.norm_before_gate else [1.0] * size
        y[n, t, part] = made.weight[part] * torch.tensor(
            [v * s / rms for v, s in zip(before, after, strict=True)], dtype=x.dtype
        )
    return y


def query_key_norm(made: Any, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    gain = made.q_norm.weight.item()

    def token(n: int, token: Tensor) -> Tensor:
        q, parts = token.tolist(), []
        for k in key[n].tolist():
            dot = math.fsum(a * b for a, b in zip(q, k, strict=True))
            parts.append(math.exp(gain * dot / math.hypot(*q) / math.hypot(*k)))
        return sum(
            (part / math.fsum(parts) * v for part, v in zip(parts, value[n], strict=True)), torch.zeros_like(token)
        )

    return _tokens(x, token)


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


def layer_norm_rnn(made: Any, x: Tensor) -> Tensor:
    def step(cell: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(_normed(cell.norm, _linear(cell.weight_ih, None, x) + _linear(cell.weight_hh, None, h))), c

    return _steps(made, x, step)


def layer_norm_lstm(made: Any, x: Tensor) -> Tensor:
    def step(cell: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        before = _normed(cell.norm_hh, _linear(cell.weight_hh, None, h))
        gates = before + _normed(cell.norm_ih, _linear(cell.weight_ih, None, x)) + cell.bias
        i, f, g, o = gates.split(len(h))
        c = _sigmoid(f) * c + _sigmoid(i) * torch.tanh(g)
        return _sigmoid(o) * torch.tanh(_normed(cell.norm_c, c)), c

    return _steps(made, x, step)


def layer_norm_gru(made: Any, x: Tensor) -> Tensor:
    def step(cell: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        d = len(h)
        from_x, from_h = _linear(cell.weight_ih, None, x), _linear(cell.weight_hh, None, h)
        r, z = _sigmoid(_normed(cell.norm_hh, from_h[: 2 * d]) + _normed(cell.norm_ih, from_x[: 2 * d])).split(d)
        n = torch.tanh(_normed(cell.norm_in, from_x[2 * d :]) + r * _normed(cell.norm_hn, from_h[2 * d :]))
        return (1 - z) * h + z * n, c

    return _steps(made, x, step)


def preconditioned_attention(made: Any, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    def token(n: int, token: Tensor) -> Tensor:
        weights = ((token * key[n]).sum(-1) / math.sqrt(len(token))).exp()
        row = (weights[:, None] * value[n]).sum(0) / weights.sum()
        return row / row.square().sum().sqrt()

    return _tokens(x, token)


def conditioned_tokens(made: Any, x: Tensor) -> Tensor:
    """By the polar factor U V^T = X (X^T X)^(-1/2), from eigenvalues of X^T X."""

    def sample(x: Tensor) -> Tensor:
        squares, vectors = torch.linalg.eigh(x.T @ x)
        polar = x @ vectors @ torch.diag(squares.clamp_min(0).rsqrt()) @ vectors.T
        return x.to(torch.float64) + squares.max().sqrt() * polar

    return torch.stack([sample(one) for one in x])


def hypersphere_residual(made: Any, x: Tensor, branch: Tensor) -> Tensor:
    rate = made.rate.weight * 0.05 * math.sqrt(made.features)

    def moved_token(token: Tensor, target: Tensor) -> Tensor:
        moved = token + rate * (target / math.hypot(*target.tolist()) - token)
        return moved / math.hypot(*moved.tolist())

    return torch.stack(
        [torch.stack([moved_token(h, b) for h, b in zip(x[n], branch[n], strict=True)]) for n in range(len(x))]
    )


LAYER_ORACLES: dict[str, Callable[..., Tensor]] = {
    "adaptive_layer_norm": adaptive_layer_norm,
    "adaptive_layer_norm_zero": adaptive_layer_norm_zero,
    "dynamic_erf": dynamic_erf,
    "film": film,
    "fix_norm": fix_norm,
    "gated_rms_norm": gated_rms_norm,
    "hypersphere_residual": hypersphere_residual,
    "layer_norm_gru": layer_norm_gru,
    "layer_norm_lstm": layer_norm_lstm,
    "layer_norm_rnn": layer_norm_rnn,
    "partial_rms_norm": partial_rms_norm,
    "query_key_norm": query_key_norm,
    "preconditioned_attention": preconditioned_attention,
    "conditioned_tokens": conditioned_tokens,
    "seed_norm": seed_norm,
}
