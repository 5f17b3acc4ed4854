"""The batch family's methods that are not one rule, written otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _mean_and_var(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


def _batch_renorm(made, x: Tensor) -> Tensor:
    r_max, d_max = made.schedule(0)
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        mean, var = _mean_and_var(x[:, c].flatten().tolist())
        deviation = math.sqrt(var + made.eps)
        r = min(max(deviation / made.running_std[c].item(), 1 / r_max), r_max)
        d = min(max((mean - made.running_mean[c].item()) / made.running_std[c].item(), -d_max), d_max)
        y[:, c] = made.weight[c] * ((x[:, c] - mean) / deviation * r + d) + made.bias[c]
    return y


def _batch_channel_norm(made, x: Tensor) -> Tensor:
    z, y = torch.empty_like(x), torch.empty_like(x)
    for c in range(x.shape[1]):
        mean, var = _mean_and_var(x[:, c].flatten().tolist())
        z[:, c] = made.weight[c] * (x[:, c] - mean) / math.sqrt(var + made.eps) + made.bias[c]
    size = x.shape[1] // made.num_groups
    for n in range(x.shape[0]):
        for g in range(made.num_groups):
            group = slice(g * size, (g + 1) * size)
            mean, var = _mean_and_var(z[n, group].flatten().tolist())
            y[n, group] = made.group_weight[g] * (z[n, group] - mean) / math.sqrt(var + made.eps) + made.group_bias[g]
    return y


def _est_batch_norm(made, x: Tensor) -> Tensor:
    y, r = torch.empty_like(x), made.momentum
    for c in range(x.shape[1]):
        values, old = x[:, c].flatten().tolist(), made.running_mean[c].item()
        mean = (1 - r) * old + r * math.fsum(values) / len(values)
        var = (1 - r) * made.running_var[c].item() + r * math.fsum((v - old) ** 2 for v in values) / len(values)
        y[:, c] = made.weight[c] * (x[:, c] - mean) / math.sqrt(var + made.eps) + made.bias[c]
    return y


BATCH_ORACLES: dict[str, Callable[..., Tensor]] = {
    "batch_renorm": _batch_renorm,
    "batch_channel_norm": _batch_channel_norm,
    "est_batch_norm": _est_batch_norm,
}
