"""Inference of whole networks before and after `normkit.fold`: latency, and the error that folding leaves.

    python benchmarks/fold.py [--rounds 9] [--output benchmarks/RESULTS.md]

It needs transformers, for two of the networks.

Both run in each round, in turns, in one process of one thread; a time is the first quartile over rounds of processor time.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2Model, ResNetConfig, ResNetModel

import normkit as nk
from normkit.lab.bench.race import quartile
from normkit.lab.models.convolutional import resnet18
from normkit.surgery.watch import run_on
from page import alternate, how, ratio, said, table, write


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mix(self.first(x)).unflatten(-1, (3, 4, -1)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(-3, -2).flatten(-2))
        return x + self.narrow(nn.functional.gelu(self.widen(self.second(x))))


def transformer(width: int, depth: int) -> nn.Module:
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(nn.Embedding(512, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 512))


def networks() -> dict[str, tuple[nn.Module, Tensor, dict[str, bool]]]:
    standardized = nk.apply_recipe(resnet18(width=0.5), "keep+ws").model
    tokens, photograph = torch.randint(512, (1, 64)), torch.randn(1, 3, 224, 224)
    return {
        "ResNet-18, width 0.5, 1 image 32x32": (resnet18(width=0.5), torch.randn(1, 3, 32, 32), {}),
        "ResNet-18, width 0.5, 16 images 32x32": (resnet18(width=0.5), torch.randn(16, 3, 32, 32), {}),
        "the same with standardized weights, 1 image": (standardized, torch.randn(1, 3, 32, 32), {}),
        "ResNet-50 of transformers, 1 image 224x224": (ResNetModel(ResNetConfig()), photograph, {}),
        "MobileNetV2 of transformers, 1 image 224x224": (MobileNetV2Model(MobileNetV2Config()), photograph, {}),
        "transformer, 4 x 256, 64 tokens": (transformer(256, 4), tokens, {}),
        "the same, with centring": (transformer(256, 4), tokens, {"centring": True}),
    }


def infer(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            run_on(model, x)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a markdown file whose section 'Folded' is replaced")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found, rows = {}, []
    for name, (model, x, options) in networks().items():
        for tensor in [*model.parameters()]:  # not as they start, where gains and biases are nothing to fold
            tensor.data += 0.2 * tensor.abs().mean() * torch.randn_like(tensor) + 1e-3
        changes = nk.fold(copy.deepcopy(model.eval()), x, **options)
        before, after = alternate(infer(model, x), infer(changes.model, x), arguments.rounds, time.process_time)
        error, gain = max(row.error or 0.0 for row in changes), ratio(before, after)
        found[name] = {"layers": len(changes), "error": error, "original / folded": gain, "ms": quartile(before) * 1e3}
        rows.append([name, str(len(changes)), f"{error:.0e}", f"{found[name]['ms']:.2f}", said(gain)])
        print(" | ".join(rows[-1]), flush=True)
    text = (
        f"{how(f'python benchmarks/fold.py --rounds {arguments.rounds}')} Processor time of a forward pass of the network "
        "over that after `normkit.fold`, with the interval; the error is the largest of all folds, relative to the largest "
        "output, in float32. Centring leaves torch's RMS normalization, on a CPU several operations where layer normalization "
        "is one kernel: it is there for rotations of the stream, and `normkit.accelerate` puts a kernel there.\n\n"
        f"{table(('network', 'layers folded', 'error', 'original ms', 'original / folded'), rows)}"
    )
    write(arguments.output, "Folded", text, found)


if __name__ == "__main__":
    main()
