"""What the monitor costs at its default: time of training with it over time without, and what it says itself.

python benchmarks/monitor.py --steps 600
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit as nk
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.models.vit import VisionTransformer

BLOCK = 100  # steps with the monitor and without in turns, so that both see the same load


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
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| network | ms per step | with / without | says itself | samples | condition numbers |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, (model, x) in networks().items():
        twin, blocks = copy.deepcopy(model), max(1, options.steps // BLOCK)
        train(model, x, 5, lambda: None)
        train(twin, x, 5, lambda: None)
        times, records = list[tuple[float, float]](), list[dict[str, float] | None]()
        monitor = nk.Monitor(twin)
        for _ in range(blocks):
            without = train(model, x, BLOCK, lambda: None)
            monitor._clock = time.perf_counter()  # the other model's steps are not of its time
            times.append((without, train(twin, x, BLOCK, lambda: records.append(monitor.step()))))  # noqa: B023
        monitor.close()
        taken = [record for record in records if record]
        kappas = sum(key.startswith("condition/") for record in taken for key in record)
        print(
            f"| {name} | {1000 * median(a for a, _ in times) / BLOCK:.1f} | {median(b / a for a, b in times):.3f} | "
            f"{monitor.spent / monitor.elapsed:.1%} | {len(taken)} | {kappas} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
