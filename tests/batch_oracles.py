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


BATCH_ORACLES: dict[str, Callable[..., Tensor]] = {"batch_renorm": _batch_renorm}
