"""Rounding errors against float64, of the kernels and of torch.

    python benchmarks/accuracy.py [--small] [--output benchmarks/RESULTS.md]

An error is the largest difference from the same computation in float64 on the same rounded input, in units in the last place
(ulp) of the largest value. ``forward`` is the output, ``backward`` the gradient of the input.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk

TITLE = "Accuracy"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RATIOS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4)
OUTLIER = "outlier"  # mean 0; what comes first along any axis is 1000 times as large


def _over_channels(x: Tensor, c: int, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (c,), w, b).movedim(-1, 1)


@dataclass(frozen=True)
class Method:
    """One method: torch's function, normkit's layer, and the shapes of the table and of the test."""

    name: str
    function: Callable[[Tensor, int, Tensor, Tensor], Tensor]
    layer: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    small: tuple[int, ...]

    def layouts(self) -> tuple[str, ...]:
        return ("contiguous", "channels last") if len(self.shape) == 4 else ("contiguous",)


METHODS = (
    Method(
        "BatchNorm",
        lambda x, c, w, b: F.batch_norm(x, None, None, w, b, True),
        lambda c: nk.BatchNorm(c),
        (16, 64, 28, 28),
        (4, 16, 7, 7),
    ),
    Method(
        "BatchNorm of rows",
        lambda x, c, w, b: F.batch_norm(x, None, None, w, b, True),
        lambda c: nk.BatchNorm(c),
        (64, 256),
        (24, 40),
    ),
    Method(
        "LayerNorm", lambda x, c, w, b: F.layer_norm(x, (c,), w, b), lambda c: nk.LayerNorm(c), (4096, 1024), (40, 300)
    ),
    Method(
        "RMSNorm",
        lambda x, c, w, b: F.rms_norm(x, (c,), w, 1e-6),
        lambda c: nk.RMSNorm(c, eps=1e-6),
        (4096, 1024),
        (40, 300),
    ),
    Method(
        "GroupNorm",
        lambda x, c, w, b: F.group_norm(x, 8, w, b),
        lambda c: nk.GroupNorm(8, c),
        (8, 64, 28, 28),
        (3, 16, 7, 7),
    ),
    Method(
        "InstanceNorm",
        lambda x, c, w, b: F.instance_norm(x, None, None, w, b),
        lambda c: nk.InstanceNorm(c, affine=True),
        (8, 64, 28, 28),
        (3, 16, 7, 7),
    ),
    Method("LayerNorm over c", _over_channels, lambda c: nk.LayerNorm(c, over="c"), (8, 64, 28, 28), (3, 16, 7, 7)),
)


@dataclass(frozen=True)
class Cell:
    """What was measured: errors of normkit and torch, forward and backward, in ulp of the largest value."""

    method: str
    layout: str
    dtype: torch.dtype
    input: float | str
    forward: tuple[float, float]
    backward: tuple[float, float]

    def excess(self) -> float:
        """Ulps by which normkit errs more than torch."""
        return max(self.forward[0] - self.forward[1], self.backward[0] - self.backward[1])


def _input(shape: tuple[int, ...], kind: float | str, dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if isinstance(kind, str):
        first = torch.zeros(shape, dtype=torch.bool)
        for axis in range(x.dim()):
            first.select(axis, 0).fill_(True)
        x = torch.where(first, 1e3 * x, x)
    else:
        x += kind
    return x.to(dtype).to(memory_format=torch.channels_last if layout == "channels last" else torch.contiguous_format)


def _run(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def _ulps(found: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest error, in units in the last place of the largest value."""
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(float(exact.abs().max())))
    return float((found.double() - exact).abs().max()) / ulp


def cell(method: Method, layout: str, dtype: torch.dtype, kind: float | str, small: bool, seed: int = 0) -> Cell:
    """The errors of one method on one kind of input."""
    shape = method.small if small else method.shape
    channels = shape[1]
    x = _input(shape, kind, dtype, layout, seed)
    dy = _input(shape, 0.0, dtype, layout, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    w, b = ((torch.randn(channels, generator=generator) * 0.5 + at).to(dtype) for at in (1, 0))
    layer = method.layer(channels).to(dtype)
    layer.backend = "native"  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    with torch.no_grad():
        for name, value in (("weight", w), ("bias", b)):
            if getattr(layer, name, None) is not None:
                getattr(layer, name).copy_(value)
    ours = _run(layer, x, dy)
    theirs = _run(lambda t: method.function(t, channels, w, b), x, dy)
    exact = _run(lambda t: method.function(t, channels, w.double(), b.double()), x.double(), dy.double())
    forward, backward = ((_ulps(ours[i], exact[i], dtype), _ulps(theirs[i], exact[i], dtype)) for i in range(2))
    return Cell(method.name, layout, dtype, kind, forward, backward)


def _largest(own: list[Cell]) -> str:
    """The largest errors forward; backward, and torch's in brackets."""
    pairs = ([max(getattr(c, way)[who] for c in own) for who in (0, 1)] for way in ("forward", "backward"))
    return "; ".join(f"{ours:.2g} ({theirs:.2g})" for ours, theirs in pairs)


def main() -> None:
    """Prints a line for each method and dtype, and writes the section."""
    from page import how, table, write

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the shapes of the test")
    parser.add_argument("--output", type=Path, help=f"a Markdown file whose section '{TITLE}' is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Cell] = []
    rows = []
    for method in METHODS:
        rows.append([method.name])
        for dtype in DTYPES:
            kinds = itertools.product(method.layouts(), (*RATIOS, OUTLIER))
            own = [cell(method, layout, dtype, kind, options.small) for layout, kind in kinds]
            found += own
            rows[-1].append(_largest(own))
        print(" | ".join(rows[-1]), flush=True)
    worse = sum(c.excess() > 1 for c in found)
    command = "python benchmarks/accuracy.py" + " --small" * options.small
    columns = ("layer", *(str(dtype).removeprefix("torch.") for dtype in DTYPES))
    text = (
        f"{how(command)} The largest error against float64, in units in the last place of the largest "
        f"value, over inputs of means 0 to 10000 deviations and one with outliers, in both memory formats: forward; backward "
        f"(torch's). {worse} of {len(found)} cells err by over one unit more than torch.\n\n{table(columns, rows)}"
    )
    record = [
        {
            **{k: str(v) for k, v in vars(c).items() if k not in ("forward", "backward")},
            # A record takes no infinity, which a peer's error may be.
            "forward": [v if math.isfinite(v) else str(v) for v in c.forward],
            "backward": [v if math.isfinite(v) else str(v) for v in c.backward],
        }
        for c in found
    ]
    write(options.output, TITLE, text, record)


if __name__ == "__main__":
    main()
