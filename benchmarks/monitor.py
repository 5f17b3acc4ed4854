"""What the monitor costs at its default: a sampled step over one without, in paired rounds, and the share that it says itself.

python benchmarks/monitor.py --steps 600 [--output benchmarks/RESULTS.md]
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit as nk
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.models.vit import VisionTransformer
from normkit.lab.stats import median_interval
from page import how, table, write

TITLE = "Monitor"


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks of steps of milliseconds to a tenth of a second, with a batch."""
    widths = [part for _ in range(4) for part in (nn.Linear(256, 256), nn.ReLU())]
    return {
        "MLP 4x256, batch 128": (nn.Sequential(*widths, nn.Linear(256, 10)), torch.randn(128, 256)),
        "CNN of 5 layers, 64 images 32x32": (SmallCNN(nn.BatchNorm2d), torch.randn(64, 3, 32, 32)),
        "ViT 4x64, 64 images 32x32": (VisionTransformer(32, 4, 64, 4, 4), torch.randn(64, 3, 32, 32)),
    }


def train(model: nn.Module, x: Tensor, count: int, after: Callable[[], object]) -> float:
    """Processor seconds of some steps."""
    optimizer, y = torch.optim.SGD(model.parameters(), 1e-3), torch.arange(len(x)) % 10
    start = time.process_time()
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()
    return time.process_time() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=301)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help=f"a Markdown file whose section '{TITLE}' is replaced")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows, record = [], {}
    for name, (model, x) in networks().items():
        twin = copy.deepcopy(model)
        train(model, x, 5, lambda: None)
        train(twin, x, 5, lambda: None)
        # A hundredth of a step more is lost in the noise of a shared machine: here every step is sampled. Rounds are pairs, in
        # turns which comes first, so that what else runs slows both; processor time leaves out the waiting.
        monitor, plain, ratios = nk.Monitor(twin, every=1, share=math.inf), list[float](), list[float]()
        monitor._weights = []  # condition numbers are taken within what is left of the share
        ways: list[tuple[nn.Module, Callable[[], object]]] = [(model, lambda: None), (twin, monitor.step)]
        for turn in range(options.rounds):
            taken = {id(each): train(each, x, 3, after) / 3 for each, after in ways[:: 1 - 2 * (turn % 2)]}
            plain.append(taken[id(model)])
            ratios.append(taken[id(twin)] / taken[id(model)])
        monitor.close()
        ends, middle = median_interval(ratios) or (math.nan, math.nan), median(ratios)
        found = f"{middle:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"
        more = f"{middle - 1:.2f}% ({ends[0] - 1:.2f} to {ends[1] - 1:.2f})"
        short = nk.Monitor(twin)
        train(twin, x, options.steps, short.step)
        short.close()
        said = f"{short.spent / short.elapsed:.2%}"
        rows.append([name, f"{1000 * median(plain):.1f}", found, more, said])
        record[name] = {"plain": plain, "ratios": ratios, "says": short.spent / short.elapsed}
        print(" | ".join(rows[-1]), flush=True)
    command = f"python benchmarks/monitor.py --steps {options.steps} --rounds {options.rounds}"
    columns = ("network", "ms per step", "sampled over plain", "more in 100 steps", "says itself")
    text = (
        f"{how(command)} Processor time of a step that `nk.Monitor` samples (activations, gradients and the gap) over one "
        f"without, in {options.rounds} pairs of 3 steps each: the median and its interval. By default one of 100 steps is "
        f"sampled. Last, the share that the monitor says of itself over {options.steps} steps, condition numbers included."
        f"\n\n{table(columns, rows)}"
    )
    write(options.output, TITLE, text, record)


if __name__ == "__main__":
    main()
