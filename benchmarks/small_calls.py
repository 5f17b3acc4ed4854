"""Time of calls so small that the way from Python to the kernel counts, relative to torch's layers.

    python benchmarks/small_calls.py [--rounds 101] [--profile] [--output benchmarks/RESULTS.md]

One thread; rounds of normkit and torch alternate and are timed in processor time, to which other processes do not add. A cell is
the median over rounds of normkit's time over torch's, with the quartiles. ``--profile`` shows what a call of normkit is made of
instead; ``kernel`` is the library with ctypes.
"""

import argparse
import cProfile
import pstats
import statistics
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.engine import library
from normkit.lab.bench.speed import geometric_mean
from page import how, table, write

TITLE = "Small calls"
ROWS, IMAGES = ((1, 64), (8, 64), (64, 64), (1, 256), (64, 256)), ((8, 32, 8, 8),)
# normkit's layer and torch's for a number of channels, and the shapes that both take.
LAYERS = {
    "BatchNorm 1d": (nk.BatchNorm, nn.BatchNorm1d, ROWS[1:3] + ROWS[4:]),  # one row has no variance
    "BatchNorm 2d": (nk.BatchNorm, nn.BatchNorm2d, IMAGES),
    "LayerNorm": (nk.LayerNorm, nn.LayerNorm, ROWS),
    "RMSNorm": (nk.RMSNorm, nn.RMSNorm, ROWS),
    "GroupNorm": (partial(nk.GroupNorm, 8), partial(nn.GroupNorm, 8), ROWS + IMAGES),
    "InstanceNorm 2d": (nk.InstanceNorm, nn.InstanceNorm2d, IMAGES),
}
MODES = ("train forward", "train forward + backward", "eval forward, no grad")


def call_of(layer: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    layer.train(mode.startswith("train"))
    if mode.endswith("no grad"):
        return torch.no_grad()(lambda: layer(x))
    x = x.clone().requires_grad_()
    if not mode.endswith("backward"):
        return lambda: layer(x)
    wanted, dy = [x, *layer.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def seconds(call: Callable[[], object], number: int) -> float:
    return timeit.timeit(call, number=number, timer=time.process_time) / number


def ratios(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[list[float], float]:
    """Ratios of paired rounds, and the median time of torch's call in seconds."""
    number = 1 + round(1e-3 / seconds(theirs, 50))  # rounds of some 1 ms, most of which no other process cuts in two
    seconds(ours, number)
    rows = []
    for turn in range(rounds):
        order = (ours, theirs) if turn % 2 else (theirs, ours)  # whoever comes second finds the caches of the first
        times = {call: seconds(call, number) for call in order}
        rows.append((times[ours] / times[theirs], times[theirs]))
    return [ratio for ratio, _ in rows], statistics.median(torchs for _, torchs in rows)


def watch_kernels() -> None:
    """Let a profiler see calls of the library, as it sees none of ctypes; before the first of them."""
    found: Any = library.library()
    for name in library._SYMBOLS if found else ():
        kind: Any = type(getattr(found, name))

        def kernel(self: Any, *given: object, plain: Callable[..., int] = kind.__call__) -> int:
            return plain(self, *given)

        seen = type(name, (kind,), {"_flags_": kind._flags_, "_restype_": kind._restype_, "__call__": kernel})
        setattr(found, name, seen((name, found)))


def profile(name: str, call: Callable[[], object], number: int = 5000) -> None:
    call()
    watched = cProfile.Profile()
    with watched:
        timeit.timeit(call, number=number)
    print(f"\n### {name}: {seconds(call, number) * 1e6:.1f} us unwatched; own time under the profiler\n")
    print("| function | calls | us per call of the layer |\n|---|--:|--:|")
    stats: Any = vars(pstats.Stats(watched))["stats"]
    for (file, line, function), (_, count, own, *_) in sorted(stats.items(), key=lambda item: -item[1][2])[:15]:
        place = "" if file == "~" else f"{file.rpartition('/')[2]}:{line} "
        print(f"| {place}{function} | {count / number:g} | {own / number * 1e6:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--layers", default="", help="names that contain this")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, help=f"a Markdown file whose section '{TITLE}' is replaced")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.profile:
        watch_kernels()
    found: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    for name, (ours, theirs, shapes) in LAYERS.items():
        for shape in shapes if given.layers in name else ():
            x, size = torch.randn(shape), "x".join(map(str, shape))
            for mode in MODES:
                mine = call_of(ours(shape[1]), x, mode)
                if given.profile:
                    profile(f"{name}, {size}, {mode}", mine)
                    continue
                pairs, torchs = ratios(mine, call_of(theirs(shape[1]), x, mode), given.rounds)
                low, middle, high = statistics.quantiles(pairs, n=4)
                found.setdefault(name, {}).setdefault(mode, {})[size] = (middle, low, high, torchs * 1e6)
                print(
                    f"{name} {size}, {mode}: {middle:.2f} ({low:.2f}-{high:.2f}) of {torchs * 1e6:.1f} us", flush=True
                )
    rows = []
    for name, modes in found.items():
        row = [name, str(len(LAYERS[name][2]))]
        for shapes in modes.values():
            worst = max(shapes, key=lambda size: shapes[size][0])
            row.append(
                f"{geometric_mean([cell[0] for cell in shapes.values()]):.2f}; {shapes[worst][0]:.2f} of {worst}"
            )
        rows.append(row)
    text = (
        f"{how(f'python benchmarks/small_calls.py --rounds {given.rounds}')} normkit's processor time over torch's: the "
        'geometric mean over the shapes, then the worst. "Train forward" records gradients. The goal is 1.05.\n\n'
        f"{table(('layer', 'shapes', *MODES), rows)}"
    )
    if found:
        write(given.output, TITLE, text, found)


if __name__ == "__main__":
    main()
