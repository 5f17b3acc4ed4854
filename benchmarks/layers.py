"""Speed of the layers beside torch's own, as ratios in one run, and as fractions of the copy bandwidth.

    python benchmarks/layers.py [--quick] [--compile] [--output benchmarks/RESULTS.md]

All variants of a case take turns in shuffled order in one process, and the 25th percentile of each is compared: noise on a
busy machine is one-sided. The fraction is (useful bytes / bandwidth of a copy of the same size) / time, where useful is one
read and one write forward, and two reads and one write backward.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

import normkit as nk

SHAPES = {
    "tokens": [(4096, 1024), (64, 256)],
    "images": [(16, 256, 28, 28), (32, 64, 56, 56)],
}
CASES: list[tuple[str, str, Callable[[int], nn.Module], Callable[[int], nn.Module]]] = [
    ("LayerNorm", "tokens", nk.LayerNorm, nn.LayerNorm),
    ("RMSNorm", "tokens", nk.RMSNorm, nn.RMSNorm),
    ("BatchNorm", "images", nk.BatchNorm, nn.BatchNorm2d),
    ("GroupNorm(32)", "images", lambda c: nk.GroupNorm(32, c), lambda c: nn.GroupNorm(32, c)),
    ("InstanceNorm", "images", lambda c: nk.InstanceNorm(c, affine=True), lambda c: nn.InstanceNorm2d(c, affine=True)),
    ("LayerNorm over channels", "images", lambda c: nk.LayerNorm(c, over="c"), lambda c: _Permuted(c)),
]


class _Permuted(nn.LayerNorm):
    """How one normalizes over channels with torch: permute, normalize, permute back."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def step(layer: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, train: bool) -> None:
    if not train:
        with torch.no_grad():
            layer(x)
        return
    x.grad = None
    layer(x).backward(direction)


def quartile(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 4]


def race(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each variant: 25th percentile of runs in shuffled order."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 3):
        for name in random.sample(list(variants), len(variants)):
            start = time.perf_counter()
            variants[name]()
            if round_number >= 3:  # the first rounds warm caches and allocators
                samples[name].append(time.perf_counter() - start)
    return {name: quartile(times) for name, times in samples.items()}


def measure(rounds: int, compiled: bool, quick: bool) -> list[str]:
    rows = []
    for name, kind, ours, theirs in CASES:
        for shape in SHAPES[kind][: 1 if quick else None]:
            for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                for last in (False, True) if kind == "images" else (False,):
                    rows.append(measure_one(name, ours, theirs, shape, dtype, last, rounds, compiled))
                    print(rows[-1], flush=True)
    return rows


def measure_one(
    name: str,
    ours: Callable[[int], nn.Module],
    theirs: Callable[[int], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: bool,
    rounds: int,
    compiled: bool,
) -> str:
    x = torch.randn(shape, dtype=dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    channels = list(shape)[1]
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours(channels).to(dtype),
        "eager": theirs(channels).to(dtype),
    }
    if compiled:
        torch._dynamo.reset()
        layers["compile"] = torch.compile(theirs(channels).to(dtype), fullgraph=True)
    cells = []
    for train in (False, True):
        z, direction = x.clone().requires_grad_(train), torch.randn_like(x)
        runs: dict[str, Callable[[], object]] = {
            key: lambda layer=layer, z=z, d=direction, t=train: step(layer, z, d, t) for key, layer in layers.items()
        }
        out = torch.empty_like(x)
        runs["copy"] = lambda out=out: out.copy_(x)
        times = race(runs, rounds)
        traversals = 5 if train else 2
        fraction = traversals / 2 * times["copy"] / times["ours"]
        ratios = " ".join(f"{times[peer] / times['ours']:.2f}" for peer in ("eager", "compile") if peer in times)
        cells.append(f"{times['ours'] * 1e3:.3f} | {ratios} | {fraction:.2f}")
    layout = "channels last" if last else "contiguous"
    size = "x".join(map(str, shape))
    return f"| {name} | {size} | {str(dtype).removeprefix('torch.')} | {layout} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one shape and dtype of each")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of torch's layer")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="a markdown file whose section 'Layers' is replaced")
    arguments = parser.parse_args()
    peers = "eager, compile" if arguments.compile else "eager"
    head = [
        f"| layer | input | dtype | memory | forward ms | {peers} / ours | of roofline "
        f"| forward + backward ms | {peers} / ours | of roofline |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    print("\n".join(head))
    rows = measure(arguments.rounds, arguments.compile, arguments.quick)
    if arguments.output:
        flags = "".join(f" --{flag}" for flag in ("quick", "compile") if getattr(arguments, flag))
        text = (
            f"`python benchmarks/layers.py{flags} --output benchmarks/RESULTS.md`, {date.today()}, "
            f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads. "
            "A ratio above 1 means that normkit is faster.\n\n" + "\n".join(head + rows)
        )
        replace_section(arguments.output, "Layers", text)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def replace_section(path: Path, title: str, text: str) -> None:
    """Replace the section of this title in a markdown file, or append it."""
    parts = path.read_text().split("\n## ") if path.exists() else ["# Measured speed\n"]
    parts = [part for part in parts if not part.startswith(f"{title}\n")]
    parts.append(f"{title}\n\n{text}\n")
    path.write_text("\n## ".join(part.rstrip("\n") + "\n" for part in parts))


if __name__ == "__main__":
    main()
