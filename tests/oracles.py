"""What a rule means, written otherwise: element by element, sums by math.fsum, no axes, no broadcasting."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from layer_oracles import ORACLES, oracle
from normkit import Rule, Support


def coordinates(support: Support, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], dict[str, tuple[int, ...]]]]:
    """Each index of a tensor with its coordinate on every named axis, by integer arithmetic on the notation alone."""
    tokens = support.axes.replace("(", " ( ").replace(")", " ) ").split()
    groups: list[list[str]] = []
    depth = 0
    for token in tokens:
        if token == "(":
            groups.append([])
            depth = 1
        elif token == ")":
            depth = 0
        elif depth:
            groups[-1].append(token)
        else:
            groups.append([token])
    stars = len(shape) - (len(groups) - any(group == ["*"] for group in groups))
    sizes = dict(support.sizes)
    for index in product(*(range(size) for size in shape)):
        place, at = {}, 0
        for group in groups:
            if group == ["*"]:
                place["*"] = tuple(index[at : at + stars])
                at += stars
                continue
            rest, extent = index[at], shape[at]
            known = math.prod(sizes.get(name, 1) for name in group)
            for name in reversed(group):
                size = sizes.get(name, extent // known)
                place[name] = (rest % size,)
                rest //= size
            at += 1
        yield index, place


def normalized(rule: Rule, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A rule with statistics of the input itself, in float64."""
    x = x.double()
    sets: dict[tuple[object, ...], list[float]] = defaultdict(list)
    owner: dict[tuple[int, ...], tuple[object, ...]] = {}
    affine: dict[tuple[int, ...], int] = {}
    order: dict[tuple[object, ...], int] = {}
    per = rule.compensation.per.replace("(", " ").replace(")", " ").split() if rule.compensation else []
    for index, place in coordinates(rule.support, x.shape):
        owner[index] = tuple(place[name] for name in rule.support.kept)
        sets[owner[index]].append(x[index].item())
        affine[index] = order.setdefault(tuple(place[name] for name in per), len(order))
    statistics = {key: _center_and_scale(rule, values) for key, values in sets.items()}
    y = torch.empty_like(x)
    for index in owner:
        center, scale = statistics[owner[index]]
        value = (x[index].item() - center) / scale
        if weight is not None:
            offset = rule.compensation.offset if rule.compensation else 0.0
            value *= offset + weight.reshape(-1)[affine[index]].item()
        if bias is not None:
            value += bias.reshape(-1)[affine[index]].item()
        y[index] = value
    return y


def _center_and_scale(rule: Rule, values: list[float]) -> tuple[float, float]:
    statistic = rule.statistic
    eps = torch.finfo(torch.float64).eps if statistic.eps is None else statistic.eps
    count = len(values)
    mean = math.fsum(values) / count
    center = {"mean": mean, "min": min(values), None: 0.0}[statistic.center]
    if statistic.scale is None:
        return center, 1.0
    squares = {
        "std": math.fsum((v - mean) ** 2 for v in values) / max(count - statistic.correction, 1),
        "rms": math.fsum(v * v for v in values) / count,
        "norm": math.fsum(v * v for v in values),
        "range": (max(values) - min(values)) ** 2,
        "max": max(abs(v) for v in values) ** 2,
    }[statistic.scale]
    if statistic.guard == "inside":
        return center, math.sqrt(squares + eps)
    bare = math.sqrt(squares)
    return center, bare + eps if statistic.guard == "outside" else max(bare, eps)


# Methods that are not one rule, see ORACLES


def _mean_and_var(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


@oracle
def batch_renorm(made, x: Tensor) -> Tensor:
    r_max, d_max = made.schedule(0)
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        mean, var = _mean_and_var(x[:, c].flatten().tolist())
        deviation = math.sqrt(var + made.eps)
        r = min(max(deviation / made.running_std[c].item(), 1 / r_max), r_max)
        d = min(max((mean - made.running_mean[c].item()) / made.running_std[c].item(), -d_max), d_max)
        y[:, c] = made.weight[c] * ((x[:, c] - mean) / deviation * r + d) + made.bias[c]
    return y


@oracle
def batch_channel_norm(made, x: Tensor) -> Tensor:
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


@oracle
def est_batch_norm(made, x: Tensor) -> Tensor:
    y, r = torch.empty_like(x), made.momentum
    for c in range(x.shape[1]):
        values, old = x[:, c].flatten().tolist(), made.running_mean[c].item()
        mean = (1 - r) * old + r * math.fsum(values) / len(values)
        var = (1 - r) * made.running_var[c].item() + r * math.fsum((v - old) ** 2 for v in values) / len(values)
        y[:, c] = made.weight[c] * (x[:, c] - mean) / math.sqrt(var + made.eps) + made.bias[c]
    return y


@oracle
def local_response_norm(made, x: Tensor) -> Tensor:
    y, (samples, channels, positions), reach = torch.empty_like(x), x.shape, made.size // 2
    for n, c, p in product(range(samples), range(channels), range(positions)):
        around = [x[n, j, p].item() ** 2 for j in range(max(0, c - reach), min(channels - 1, c + reach) + 1)]
        y[n, c, p] = x[n, c, p].item() / (made.k + made.alpha * math.fsum(around)) ** made.beta
    return y


@oracle
def global_response_norm(made, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for n in range(len(x)):
        rows = x[n] if made.over == "*" else x.transpose(0, 1).flatten(1)
        energy = [math.sqrt(math.fsum(v * v for v in row.tolist())) for row in rows]
        for c, row in enumerate(x[n]):
            share = energy[c] / (math.fsum(energy) / len(energy) + made.eps)
            y[n, c] = made.weight[c] * row * share + made.bias[c] + row
    return y


@oracle
def adaptive_instance_norm(made, x: Tensor, style: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for n, c in product(*map(range, x.shape[:2])):
        var, mean = torch.var_mean(x[n, c], correction=0)
        style_var, style_mean = torch.var_mean(style[n, c], correction=0)
        styled = (style_var + made.eps).sqrt() * (x[n, c] - mean) / (var + made.eps).sqrt() + style_mean
        y[n, c] = made.strength * styled + (1 - made.strength) * x[n, c]
    return y


@oracle
def filter_response_norm(made, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for n, c in product(*map(range, x.shape[:2])):
        square = math.fsum(v * v for v in x[n, c].tolist()) / x.shape[2]
        eps = made.eps if made.eps_weight is None else abs(made.eps_weight.item())
        y[n, c] = made.weight[c] * x[n, c] / math.sqrt(square + eps) + made.bias[c]
    return y if made.tau is None else y.maximum(made.tau[:, None])


@oracle
def dynamic_tanh(made, x: Tensor) -> Tensor:
    e = (2 * made.alpha * x).exp()
    return made.weight * (e - 1) / (e + 1) + made.bias


def _window(at: int, size: int | None, extent: int) -> range:
    return range(extent) if size is None else range(max(0, at - size // 2), min(extent, at + size - size // 2))


@oracle
def local_contrast_norm(made, x: Tensor) -> Tensor:
    samples, channels, positions = x.shape
    square = torch.empty_like(x)
    for n, c, p in product(range(samples), range(channels), range(positions)):
        around = [x[n, c, q].item() for q in _window(p, made.window, positions)]
        square[n, c, p] = (x[n, c, p].item() - math.fsum(around) / len(around)) ** 2
    y = torch.empty_like(x)
    for n, c, p in product(range(samples), range(channels), range(positions)):
        energy = math.fsum(square[n, j, p].item() for j in _window(c, made.size, channels))
        y[n, c, p] = x[n, c, p].item() / (made.k + made.alpha * energy) ** made.beta
    return y


@oracle
def jarrett_contrast_norm(made, x: Tensor) -> Tensor:
    samples, channels, positions = x.shape

    def blurred(n: int, p: int, value: Callable[[float], float], of: Tensor) -> float:
        inside = _window(p, made.window, positions)
        weights = [math.exp(-((q - p) ** 2) / (2 * made.sigma**2)) for q in inside]
        terms = [w * value(of[n, c, q].item()) for w, q in zip(weights, inside, strict=True) for c in range(channels)]
        return math.fsum(terms) / (math.fsum(weights) * channels)

    v, y = torch.empty_like(x), torch.empty_like(x)
    for n, p in product(range(samples), range(positions)):
        v[n, :, p] = x[n, :, p] - blurred(n, p, lambda value: value, x)
    for n in range(samples):
        contrast = [math.sqrt(blurred(n, p, lambda value: value**2, v)) for p in range(positions)]
        for p in range(positions):
            y[n, :, p] = v[n, :, p] / max(contrast[p], math.fsum(contrast) / positions, made.eps)
    return y


@oracle
def divisive_norm(made, x: Tensor) -> Tensor:
    def mean(field, of: Tensor) -> Tensor:
        found = torch.empty_like(of)
        for n, c, p in product(*map(range, of.shape)):
            around = product(_window(c, field.channels, of.shape[1]), _window(p, field.positions, of.shape[2]))
            values = [of[n, j, q].item() for j, q in around]
            found[n, c, p] = math.fsum(values) / len(values)
        return found

    v = x - mean(made.summation, x)
    normalized = v / (made.sigma**2 + mean(made.suppression, v**2)) ** 0.5
    return made.weight[:, None] * normalized + made.bias[:, None]


@oracle
def lyu_simoncelli_norm(made, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for n, c, p in product(*map(range, x.shape)):
        inside = _window(p, made.window, x.shape[2])
        terms = [made.weight[c, q - p + made.window // 2].item() ** 2 * x[n, c, q].item() ** 2 for q in inside]
        y[n, c, p] = x[n, c, p].item() / math.sqrt(made.bias[c].item() ** 2 + made.eps + math.fsum(terms))
    return y


@oracle
def heeger_norm(made, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for n, c, p in product(*map(range, x.shape)):
        drive = [max(x[n, k, p].item(), 0.0) ** made.exponent for k in range(x.shape[1])]
        pool = math.fsum(made.weight[c, k].item() ** 2 * d for k, d in enumerate(drive))
        y[n, c, p] = made.gain * drive[c] / (made.sigma**made.exponent + pool)
    return y


@oracle
def local_context_norm(made, x: Tensor) -> Tensor:
    y, size = torch.empty_like(x), made.channels_per_group
    for n, c, p in product(*map(range, x.shape)):
        first, around = c // size * size, _window(p, made.window, x.shape[2])
        var, mean = torch.var_mean(x[n, first : first + size, around.start : around.stop], correction=0)
        y[n, c, p] = made.weight[c] * (x[n, c, p] - mean) / (var + made.eps).sqrt() + made.bias[c]
    return y


@oracle
def gdn(made, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for n, c, p in product(*map(range, x.shape)):
        pool = math.fsum((made.gamma[c, k].item() * x[n, k, p].item()) ** 2 for k in range(x.shape[1]))
        root = math.sqrt(made.beta[c].item() ** 2 + made.beta_min + pool)
        y[n, c, p] = x[n, c, p].item() * (root if made.inverse else 1 / root)
    return y


def _three_moments(x: Tensor, n: int, c: int) -> list[tuple[Tensor, Tensor]]:
    """Variance and mean of the instance, the layer and the batch."""
    return [torch.var_mean(part, correction=0) for part in (x[n, c], x[n], x[:, c])]


@oracle
def switchable_norm(made, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    of_mean, of_var = (w.exp() / w.exp().sum() for w in (made.mean_weight, made.var_weight))
    for n, c in product(*map(range, x.shape[:2])):
        three = _three_moments(x, n, c)
        mean = sum(share * mean for share, (_, mean) in zip(of_mean, three, strict=True))
        var = sum(share * var for share, (var, _) in zip(of_var, three, strict=True))
        y[n, c] = made.weight[c] * (x[n, c] - mean) / (var + made.eps) ** 0.5 + made.bias[c]
    return y


@oracle
def exemplar_norm(made, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for n in range(len(x)):
        three = [_three_moments(x, n, c) for c in range(x.shape[1])]
        z = []
        for k in range(3):
            seen = [(x[n, c].mean() - three[c][k][1]) / (three[c][k][0] + made.eps) ** 0.5 for c in range(x.shape[1])]
            z.append((made.reduce.weight @ torch.stack(seen) + made.reduce.bias).clamp_min(0))
        products = torch.stack([torch.dot(a, b) for a in z for b in z])
        hidden = torch.tanh(made.hidden.weight @ products + made.hidden.bias)
        logits = made.logits.weight @ hidden + made.logits.bias
        shares = logits.exp() / logits.exp().sum()
        for c in range(x.shape[1]):
            each = [(x[n, c] - mean) / (var + made.eps) ** 0.5 for var, mean in three[c]]
            y[n, c] = sum(shares[k] * (made.weight[k, c] * each[k] + made.bias[k, c]) for k in range(3))
    return y


@oracle
def conditional_instance_norm(made, x: Tensor, condition: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for n, c in product(*map(range, x.shape[:2])):
        if made.classes is not None:
            weight, bias = made.weight[condition[n], c], made.bias[condition[n], c]
        else:
            weight, bias = 1 + (condition[n] * made.weight[:, c]).sum(), (condition[n] * made.bias[:, c]).sum()
        var, mean = torch.var_mean(x[n, c] if made.over == "*" else x[:, c], correction=0)
        y[n, c] = weight * (x[n, c] - mean) / (var + made.eps).sqrt() + bias
    return y


@oracle
def spatially_adaptive_norm(made, x: Tensor, map: Tensor) -> Tensor:
    def convolved(layer, of: Tensor) -> Tensor:
        kernel = layer.weight[..., layer.weight.shape[-1] // 2]  # a sequence is an image of width one
        reach = kernel.shape[2] // 2
        out = layer.bias[:, None].repeat(1, of.shape[1])
        for p, k in product(range(of.shape[1]), range(kernel.shape[2])):
            if 0 <= p + k - reach < of.shape[1]:
                out[:, p] += kernel[:, :, k] @ of[:, p + k - reach]
        return out

    y = torch.empty_like(x)
    for n in range(len(x)):
        hidden = convolved(made.shared, map[n]).clamp_min(0)
        gain, shift = convolved(made.gain, hidden), convolved(made.shift, hidden)
        var, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
        y[n] = (1 + gain) * (x[n] - mean[:, None]) / (var + made.eps).sqrt()[:, None] + shift
    return y


ORACLES["igdn"], ORACLES["conditional_batch_norm"] = gdn, conditional_instance_norm
