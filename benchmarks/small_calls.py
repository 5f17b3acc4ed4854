"""Time of calls so small that the way from Python to the kernel counts, relative to torch's layers.

    python benchmarks/small_calls.py [--rounds 41] [--profile]

One thread; rounds of normkit and torch interleaved. A cell is the median over rounds of normkit's time over torch's, with the
quartiles of these ratios. ``--profile`` shows what a call of normkit is made of instead.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import timeit
from collections.abc import Callable

import torch
from torch import Tensor, nn

import normkit as nk

ROWS, IMAGES = ((1, 64), (8, 64), (64, 64), (1, 256), (64, 256)), ((8, 32, 8, 8),)
Pair = tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]
# Each with torch's class for rows and for images, and the shapes that both take.
LAYERS: dict[str, tuple[Pair, tuple[tuple[int, ...], ...]]] = {
    "BatchNorm 1d": ((nk.BatchNorm, nn.BatchNorm1d), ROWS[1:3] + ROWS[4:]),  # one row has no variance
    "BatchNorm 2d": ((nk.BatchNorm, nn.BatchNorm2d), IMAGES),
    "LayerNorm": ((nk.LayerNorm, nn.LayerNorm), ROWS),
    "RMSNorm": ((nk.RMSNorm, nn.RMSNorm), ROWS),
    "GroupNorm": ((lambda c: nk.GroupNorm(8, c), lambda c: nn.GroupNorm(8, c)), ROWS + IMAGES),
    "InstanceNorm 2d": ((nk.InstanceNorm, nn.InstanceNorm2d), IMAGES),
}
MODES = ("train forward", "train forward + backward", "eval forward, no grad")


def call_of(layer: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    """What is timed."""
    layer.train(mode.startswith("train"))
    if mode.endswith("no grad"):

        def quiet() -> None:
            with torch.no_grad():
                layer(x)

        return quiet
    x = x.clone().requires_grad_()
    if not mode.endswith("backward"):
        return lambda: layer(x)
    wanted, dy = [x, *layer.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def ratios(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[list[float], float]:
    """Ratios of paired rounds, and the median time of torch's call in seconds."""
    calls = [ours, theirs]
    number = max(1, round(2e-3 / (min(timeit.repeat(theirs, number=20, repeat=5)) / 20)))  # rounds of some 2 ms
    timeit.timeit(ours, number=number)
    found: list[float] = []
    torchs: list[float] = []
    for turn in range(rounds):
        order = (0, 1) if turn % 2 else (1, 0)  # whoever comes second finds the caches of the first
        times = {which: timeit.timeit(calls[which], number=number) / number for which in order}
        found.append(times[0] / times[1])
        torchs.append(times[1])
    return found, statistics.median(torchs)


def profile(name: str, call: Callable[[], object], number: int = 5000) -> None:
    """Print the functions that a call's time goes to."""
    call()
    watched = cProfile.Profile()
    with watched:
        for _ in range(number):
            call()
    total = timeit.timeit(call, number=number) / number
    print(f"\n### {name}: {total * 1e6:.1f} us unwatched; own time under the profiler\n")
    print("| function | calls | us per call of the layer |\n|---|--:|--:|")
    stats = pstats.Stats(watched).stats  # pyright: ignore[reportAttributeAccessIssue]
    for (file, line, function), (_, count, own, _, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:15]:
        place = "" if file == "~" else f"{file.rpartition('/')[2]}:{line} "
        print(f"| {place}{function.replace('|', chr(92) + '|')} | {count / number:g} | {own / number * 1e6:.2f} |")


def main() -> None:
    """Print the table, or the profiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--layers", default="", help="names that contain this")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.profile:
        print("| layer | shape | " + " | ".join(MODES) + " |\n|---|---|" + "--:|" * len(MODES))
    for name, ((ours, theirs), shapes) in LAYERS.items():
        for shape in shapes if given.layers in name else ():
            x, size = torch.randn(shape), "x".join(map(str, shape))
            cells = []
            for mode in MODES:
                mine = call_of(ours(shape[1]), x, mode)
                if given.profile:
                    profile(f"{name}, {size}, {mode}", mine)
                    continue
                found, torchs = ratios(mine, call_of(theirs(shape[1]), x, mode), given.rounds)
                low, middle, high = statistics.quantiles(found, n=4)
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f}) of {torchs * 1e6:.1f} us")
            if cells:
                print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
