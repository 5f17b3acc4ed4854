"""The peak memory of a training step of four networks: torch's norms, normkit's, and normkit's that keep the output alone.

    python benchmarks/memory.py [--networks resnet,llama] [--output benchmarks/RESULTS.md]

A peak is the most that the tensors of a step hold at once, beyond weights and batch; it does not depend on the machine. With
``--steps``, a training step of a DenseNet instead: memory given back to the system after each step, and kept by the C library.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

import normkit as nk
from networks import NETWORKS, made
from normkit.lab.memory import keep_memory, peak_bytes
from normkit.lab.models.convolutional import densenet
from page import how, only, table, write

TITLE, KEPT = "Memory", "Memory kept from step to step"
STEPS, WARM_UP, TURNS = 10, 3, 3
# What is done to a network, by the column's title.
WAYS: dict[str, Callable[[nn.Module], object]] = {
    "torch's norms": lambda model: model,
    "accelerated": nk.accelerate,
    'accelerated, save="output"': functools.partial(nk.accelerate, save="output"),
}
MEASURED = ("resnet", "convnext", "llama", "densenet")


def peak(name: str, change: Callable[[nn.Module], object]) -> int:
    """Bytes at the peak of a training step."""
    model, x = made(name)
    change(model)

    def step() -> None:
        model(x).square().mean().backward()

    step()
    model.zero_grad()
    return peak_bytes(step, x.device)


def steps() -> float:
    """The median of some steps, in milliseconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = densenet(10, width=0.5).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x, y = torch.randn(128, 3, 16, 16), torch.randint(10, (128,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    taken = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        taken.append(1e3 * (time.perf_counter() - started))
    return median(taken[WARM_UP:])


def from_step_to_step(page: Path | None) -> None:
    """Each way in processes of its own, in turns."""
    found: dict[str, list[float]] = {"given back": [], "kept": []}
    for turn in range(TURNS):
        for way, all_of_it in found.items():
            print(f"[{turn + 1}/{TURNS}] {way}", flush=True)
            done = subprocess.run([sys.executable, __file__, "--way", way], capture_output=True, text=True, check=True)
            all_of_it.append(float(done.stdout))
    torch.set_num_threads(1)
    middle = {way: median(all_of_it) for way, all_of_it in found.items()}
    text = (
        f"{how('python benchmarks/memory.py --steps')} A DenseNet (half width, 128 images of 16x16), each way in processes of "
        f"its own, in turns. Memory that tensors gave up goes back to the system: {middle['given back']:.1f} ms per step; "
        f"it is kept (`normkit.lab.memory.keep_memory`, in all trainings of the lab): {middle['kept']:.1f} ms. "
        f"Ratio {middle['kept'] / middle['given back']:.2f}; the difference is time in the system, which maps pages again."
    )
    print(text)
    write(page, KEPT, text, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(MEASURED), help=f"some of {','.join(NETWORKS)}")
    parser.add_argument("--output", type=Path, help=f"a Markdown file whose section '{TITLE}' is replaced")
    parser.add_argument("--steps", action="store_true", help=f"'{KEPT}' instead")
    parser.add_argument("--way", choices=("given back", "kept"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        if options.way == "kept" and not keep_memory():
            sys.exit("the C library is not glibc")
        return print(steps())
    if options.steps:
        return from_step_to_step(options.output)
    peaks: dict[str, dict[str, int]] = {}
    for name in only(options.networks, NETWORKS):
        print(NETWORKS[name].title, flush=True)
        peaks[name] = {way: peak(name, change) for way, change in WAYS.items()}
    first = next(iter(WAYS))
    rows = [
        [NETWORKS[name].title, f"{own[first] / 1e6:.1f}"]
        + [f"{own[way] / 1e6:.1f} ({own[way] / own[first]:.2f})" for way in list(WAYS)[1:]]
        for name, own in peaks.items()
    ]
    text = (
        f"{how('python benchmarks/memory.py')} The most that the tensors of a training step hold at once, beyond weights and "
        f"batch, in MB (and of torch's norms' peak).\n\n{table(('network', *WAYS), rows)}"
    )
    print(text)
    write(options.output, TITLE, text, peaks)


if __name__ == "__main__":
    main()
