"""How fast the layers are: against torch's own, torch.compile of the definition, and a copy of the input.

The fraction of the roofline is (useful bytes / bandwidth of a copy of the same size) / time, where the useful bytes of
a forward pass are one read and one write, and those of a backward pass two reads and one write.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log, prod
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from normkit.activations.global_response_norm import GlobalResponseNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.layer_norm import LayerNorm
from normkit.activations.local_response_norm import LocalResponseNorm
from normkit.catalogue.methods import METHODS, method
from normkit.core.errors import OptionError, closest
from normkit.engine.layer import Layer
from normkit.lab.bench.race import quartile, samples
from normkit.lab.stats import median_interval

TOKENS = ((4096, 1024), (8192, 4096), (64, 256), (1, 4096))
SEQUENCES = ((8, 512, 1024), (8, 512, 768), (2, 16, 256))
IMAGES = ((16, 256, 28, 28), (32, 64, 56, 56), (8, 1024, 14, 14))
DTYPES = (torch.float32, torch.bfloat16)
TRAVERSALS = {"forward": 2, "forward + backward": 5}
PEERS = ("eager", "compile")
# One mean of all would say nothing of any.
KERNELS, OWN, OPERATORS = "one-rule layers on native kernels", "a kernel of its own", "PyTorch operators on both sides"
# Of a copy's bandwidth, by dtype and direction, for tensors between these bytes.
GOALS = {("float32", "forward"): 0.8, ("float32", "forward + backward"): 0.65} | {
    ("bfloat16", "forward"): 0.6,
    ("bfloat16", "forward + backward"): 0.5,
}
GOALS_BYTES = range(4 << 20, 65 << 20)
LARGEST_CHECKED = 1 << 22  # elements; what is larger costs seconds in float64


class OverChannels(nn.LayerNorm):
    """Layer normalization over channels as one writes it with torch: permute, normalize, permute back."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, *) over C."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class PlainGlobalResponse(nn.Module):
    """Global response normalization, channels first, as its paper's pseudocode has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes (N, C, H, W)."""
        energy = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        return self.weight * (x * (energy / (energy.mean(dim=1, keepdim=True) + 1e-6))) + self.bias + x


class PlainAdaptiveInstance(nn.Module):
    """Adaptive instance normalization as its paper's formula reads, with the statistics of a style image."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Normalizes (N, C, H, W)."""
        (var, mean), (style_var, style_mean) = (
            torch.var_mean(z, (2, 3), keepdim=True, correction=0) for z in (x, style)
        )
        return (style_var + 1e-5).sqrt() * (x - mean) / (var + 1e-5).sqrt() + style_mean


# The layers that torch has, by the method's name, for a number of channels.
TORCH: dict[str, Callable[[int], nn.Module]] = {
    "batch_norm": nn.BatchNorm2d,
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "group_norm": lambda channels: nn.GroupNorm(32, channels),
    "instance_norm": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "layer_norm over channels": OverChannels,
    "local_response_norm": lambda channels: nn.LocalResponseNorm(5),
    "global_response_norm": PlainGlobalResponse,
    "adaptive_instance_norm": PlainAdaptiveInstance,
}
# What is alike but for what it talks to, or takes another kind of input.
LEFT_OUT = ("example_weighing", "sync_batch_norm", "recurrent_batch_norm")


@dataclass(frozen=True)
class Case:
    """One cell of the benchmark."""

    method: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    last: bool
    direction: str

    @property
    def layout(self) -> str:
        """The memory format in words."""
        return "channels last" if self.last else "contiguous"

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.method} {size} {str(self.dtype).removeprefix('torch.')} {self.layout}, {self.direction}"


def methods() -> list[str]:
    """What can be measured: every layer of the catalogue that is one rule, and what torch has besides.

    >>> {"layer_norm", "adaptive_instance_norm", "local_response_norm"} <= set(methods())
    True
    """
    ruled = [
        card.name
        for card in METHODS
        if card.kind == "activation" and card.rule is not None and card.name not in LEFT_OUT
        if isinstance(card.make(64), Layer)
    ]
    return [*ruled, *(name for name in TORCH if name not in ruled)]


def cases(names: Sequence[str] = (), quick: bool = False) -> Iterator[Case]:
    """The cells: every method, shape, dtype, layout and direction; ``quick`` takes the first shape and float32."""
    known = methods()
    for name in names:
        if name not in known:
            raise OptionError(f"methods has {name!r}; wanted some of {', '.join(known)}{closest(name, known)}")
    for name in names or known:
        images = name.endswith("over channels") or method(name).layout == "n c *"
        shapes = IMAGES if images else TOKENS if method(name).extra is None else SEQUENCES
        for shape in shapes[: 1 if quick else None]:
            for dtype in DTYPES[: 1 if quick else None]:
                for last in (False, True) if images else (False,):
                    for direction in TRAVERSALS:
                        yield Case(name, shape, dtype, last, direction)


def measure(case: Case, rounds: int = 15, compiled: bool = True) -> dict[str, Any]:
    """Times one cell."""
    torch.manual_seed(0)
    ours, eager = (layer.to(case.dtype) for layer in pair(case.method, case.shape[1 if len(case.shape) == 4 else -1]))
    x = torch.randn(case.shape).to(case.dtype)
    if case.last:
        x = x.to(memory_format=torch.channels_last)
    others = further_inputs(case.method, x)
    layers: dict[str, Callable[..., Tensor]] = {"ours": ours, "eager": eager}
    if not _runs(eager, x, others):
        del layers["eager"]
    elif compiled:
        torch._dynamo.reset()
        layers["compile"] = torch.compile(copy.deepcopy(eager), fullgraph=True)
    training = case.direction != "forward"
    for layer in (ours, eager):
        layer.train(training)
    direction = torch.randn_like(x)
    runs: dict[str, Callable[[], object]] = {
        name: _step(layer, x.detach().clone(memory_format=torch.preserve_format), others, direction, training)
        for name, layer in layers.items()
    }
    out = torch.empty_like(x)
    runs["copy"] = lambda: out.copy_(x)
    times = samples(runs, rounds)
    seconds = {name: quartile(own) for name, own in times.items()}
    ideal = TRAVERSALS[case.direction] / 2 * seconds["copy"]
    checked = "eager" in layers and x.numel() <= LARGEST_CHECKED
    return {
        "error": _errors(layers, x, others, training) if checked else {},
        "method": case.method,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "direction": case.direction,
        "backend": _backend(ours, x, others),
        "seconds": seconds,
        "ratio": {peer: seconds[peer] / seconds["ours"] for peer in PEERS if peer in seconds},
        "interval": {
            peer: median_interval([theirs / own for theirs, own in zip(times[peer], times["ours"], strict=True)])
            for peer in PEERS
            if peer in seconds
        },
        "roofline": {name: ideal / took for name, took in seconds.items() if name != "copy"},
    }


def pair(name: str, channels: int) -> tuple[nn.Module, nn.Module]:
    """The layer of normkit and its peer: torch's layer where it has one, or else the definition in plain PyTorch."""
    ours = _ours(name, channels)
    if name in TORCH:
        return ours, TORCH[name](channels)
    eager = copy.deepcopy(ours)
    eager.backend = "reference"  # pyright: ignore
    return ours, eager


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For what runs, each direction and peer: how many cells, the worst ratio and its cell, and the geometric mean."""
    found = []
    for over, direction, peer in product((KERNELS, OWN, OPERATORS), TRAVERSALS, PEERS):
        own = (row for row in rows if row["direction"] == direction and group(row) == over)
        ratios = [(row["ratio"][peer], row) for row in own if peer in row["ratio"]]
        if ratios:
            worst, row = min(ratios, key=lambda pair: pair[0])
            where = f"{row['method']} {'x'.join(map(str, row['shape']))} {row['dtype']} {row['layout']}"
            mean = geometric_mean([ratio for ratio, _ in ratios])
            below = sum(ratio < 0.95 for ratio, _ in ratios)
            found.append(
                {
                    "over": over,
                    "direction": direction,
                    "peer": peer,
                    "cells": len(ratios),
                    "geometric_mean": mean,
                    "worst": worst,
                }
                | {"worst_case": where, "worst_interval": row.get("interval", {}).get(peer), "below": below}
            )
    return found


def group(row: dict[str, Any]) -> str:
    """What ran in a cell, in words; a layer that takes more than its input does not say it itself."""
    if row["method"] in ("local_response_norm", "global_response_norm"):
        return OWN
    composed = ("conditional_batch_norm", "spatially_adaptive_norm", "adaptive_instance_norm")
    return OPERATORS if row["method"] in composed or row["backend"] in ("reference", "aten") else KERNELS


def reached(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, float, float, int, int]]:
    """For each goal: dtype, direction, goal, the median fraction of a copy, how many cells reach the goal, and of how many.

    Batch statistics of what exceeds the cache need 8 traversals forward and backward, not 5, and count as such.
    """
    found = []
    for (dtype, direction), goal in GOALS.items():
        fractions = [
            row["roofline"]["ours"] * (1.6 if "batch" in row["method"] and direction != "forward" else 1)
            for row in rows
            if (row["dtype"], row["direction"]) == (dtype, direction) and group(row) == KERNELS
            if prod(row["shape"]) * getattr(torch, dtype).itemsize in GOALS_BYTES
        ]
        if fractions:
            found.append((dtype, direction, goal, median(fractions), sum(f >= goal for f in fractions), len(fractions)))
    return found


def changes(rows: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> tuple[int, list[str], list[str]]:
    """Compares ratios to the same peers, which the machine's speed cancels out of, with those of an earlier record.

    >>> before = {"case": "a", "ratio": {"eager": 2.0}, "interval": {"eager": [1.9, 2.1]}}
    >>> now = {"case": "a", "ratio": {"eager": 1.5}, "interval": {"eager": [1.4, 1.6]}}
    >>> changes([now], [before])
    (1, ['a: 1.50 (1.40 to 1.60) of eager, was 2.00 (1.90 to 2.10)'], [])
    """
    known = {row["case"]: row for row in earlier}
    both, worse, better = 0, [], []
    for row in rows:
        before = known.get(row["case"], {"ratio": {}})
        for peer in row["ratio"].keys() & before["ratio"].keys():
            both += 1
            (low, high), (least, most) = _interval(row, peer), _interval(before, peer)
            if high < least or low > most:
                said = f"{row['case']}: {with_interval(row, peer)} of {peer}, was {with_interval(before, peer)}"
                (worse if high < least else better).append(said)
    return both, worse, better


def with_interval(row: dict[str, Any], peer: str) -> str:
    """A ratio as text, and its interval where there is one."""
    found = row.get("interval", {}).get(peer)
    return f"{row['ratio'][peer]:.2f}" + (f" ({found[0]:.2f} to {found[1]:.2f})" if found else "")


def _interval(row: dict[str, Any], peer: str) -> tuple[float, float]:
    """The interval of a ratio; the ratio alone where it was measured too few times."""
    low, high = row.get("interval", {}).get(peer) or (row["ratio"][peer],) * 2
    return low, high


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios.

    >>> geometric_mean([2.0, 0.5])
    1.0
    """
    return exp(sum(map(log, ratios)) / len(ratios))


def _ours(name: str, channels: int) -> nn.Module:
    made: dict[str, Callable[[], nn.Module]] = {
        "layer_norm over channels": lambda: LayerNorm(channels, over="c"),
        "group_norm": lambda: GroupNorm(32, channels),
        "global_response_norm": lambda: GlobalResponseNorm(channels, layout="n c *"),
        "local_response_norm": lambda: LocalResponseNorm(5, torch_compat=True),
    }
    return made[name]() if name in made else method(name).make(channels)


def further_inputs(name: str, x: Tensor) -> tuple[Any, ...]:
    """What a method takes besides its input: conditions, labels, a style."""
    card = None if name.endswith("over channels") else method(name)
    if card is None or card.extra is None:
        return ()
    return tuple(
        other.to(x.dtype) if isinstance(other, Tensor) and other.is_floating_point() else other
        for other in card.extra(x)
    )


def _step(
    layer: Callable[..., Tensor], x: Tensor, others: tuple[Any, ...], direction: Tensor, training: bool
) -> Callable[[], object]:
    def infer() -> None:
        with torch.no_grad():
            layer(x, *others)

    def learn() -> None:
        x.grad = None
        layer(x, *others).backward(direction)

    if not training:
        return infer
    x.requires_grad_()
    return learn


def _errors(layers: dict[str, Any], x: Tensor, others: tuple[Any, ...], training: bool) -> dict[str, float]:
    """The largest difference from float64, of the output or of the input's gradient, over the largest value there."""
    exact = copy.deepcopy(layers["eager"]).double()
    wide = tuple(
        other.double() if isinstance(other, Tensor) and other.is_floating_point() else other for other in others
    )
    wanted = _outcome(exact, x.detach().double(), wide, training)
    return {
        name: float(
            (_outcome(copy.deepcopy(layers[name]), x, others, training).double() - wanted).abs().max()
            / wanted.abs().max()
        )
        for name in ("ours", "eager")
    }


def _outcome(layer: Any, x: Tensor, others: tuple[Any, ...], training: bool) -> Tensor:
    z = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(training)
    y = layer(z, *others)
    if not training:
        return y.detach()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(
        torch.bfloat16
    )  # exact in every dtype
    return torch.autograd.grad(y, z, direction.to(y.dtype))[0]


def _runs(layer: nn.Module, x: Tensor, others: tuple[Any, ...]) -> bool:
    """Whether torch has the layer for this dtype at all."""
    try:
        copy.deepcopy(layer)(x, *others)  # a copy, as it may keep running statistics
    except NotImplementedError:
        return False
    return True


def _backend(layer: nn.Module, x: Tensor, others: tuple[Any, ...]) -> str:
    if not isinstance(layer, Layer) or (others and type(layer).explain is Layer.explain):
        return "-"
    return layer.explain(x, *others).backend
