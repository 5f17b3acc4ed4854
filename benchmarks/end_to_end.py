"""A training step of whole networks, as they are and with their norms handed to normkit: time, and memory kept for it.

    python benchmarks/end_to_end.py [--rounds 9] [--threads N] [--output benchmarks/RESULTS.md]

Every variant runs in each round, in shuffled order, in one process; a time is the first quartile over rounds. Memory is what
autograd keeps between forward and backward, each storage once.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.engine.library import description
from normkit.lab.bench.race import race
from normkit.lab.bench.report import replace_section
from normkit.lab.devices import cores, processor
from normkit.lab.models.convolutional import resnet18


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer normalization over channels, and two linear layers around a GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.widen, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(x).permute(0, 2, 3, 1)
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm(h)))).permute(0, 3, 1, 2)


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    transformer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True),
        4,
        enable_nested_tensor=False,
    )
    convnext = nn.Sequential(nn.Conv2d(3, 96, 4, 4), *(ConvNeXtBlock(96) for _ in range(3)))
    return {
        "transformer, 4 x 256, 8 x 256 tokens": (transformer, torch.randn(8, 256, 256)),
        "ConvNeXt-style, 3 x 96, 8 images 64x64": (convnext, torch.randn(8, 3, 64, 64)),
        "ResNet-18, width 0.5, 16 images 32x32": (resnet18(width=0.5), torch.randn(16, 3, 32, 32)),
        "ResNet-18, width 0.5, channels last": (
            resnet18(width=0.5).to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
            torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last),
        ),
    }


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return run


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).square().mean()
    del loss
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="a markdown file whose section 'End to end' is replaced")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [
        "| network | original ms | accelerated ms | original / accelerated | kept MB, original | accelerated |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (model, x) in networks().items():
        ours = nk.accelerate(copy.deepcopy(model)).model
        seconds = race({"original": step(model, x), "accelerated": step(ours, x)}, arguments.rounds)
        megabytes = [kept_bytes(m, x) / 1e6 for m in (model, ours)]
        rows.append(
            f"| {name} | {seconds['original'] * 1e3:.1f} | {seconds['accelerated'] * 1e3:.1f} "
            f"| {seconds['original'] / seconds['accelerated']:.2f} | {megabytes[0]:.1f} | {megabytes[1]:.1f} |"
        )
        print(rows[-1], flush=True)
    text = (
        f"`python benchmarks/end_to_end.py --rounds {arguments.rounds}`, {date.today()}, {processor()}, {cores()} cores, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, native kernels: {description()}. A training step "
        "(forward, backward) of the same network with torch's norms, and after `normkit.accelerate`. Kept is what autograd "
        "holds between forward and backward.\n\n" + "\n".join(rows)
    )
    if arguments.output:
        replace_section(arguments.output, "End to end", text)


if __name__ == "__main__":
    main()
