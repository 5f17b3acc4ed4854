"""What weight conditioning costs a training step, and where scaling the output overtakes rebuilding the weight.

    python benchmarks/conditioning.py [--threads 1] [--rounds 60] [--device cpu]

Every variant of a case runs in each round, in shuffled order, so that a busy machine slows all alike; a time is the first
quartile over rounds, as noise only adds. With one thread on a CPU it is processor time, which others' work does not lengthen.
A step is forward and backward, without the optimizer. 1.00 is the plain layer.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.weights.weight_conditioning import weight_conditioning


class Naive(nn.Module):
    """Row equilibration as one writes it first: autograd through the definition."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (weight.dim() - 1))


def conditioned(model: nn.Module, path: str) -> nn.Module:
    """A copy of the model with every layer conditioned; ``path`` is plain, naive, weight, output or auto."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            if path == "naive":
                parametrize.register_parametrization(layer, "weight", Naive())
            elif path != "plain":
                weight_conditioning(layer, path=path)  # pyright: ignore[reportArgumentType]
    return model


def step(model: nn.Module, x: Tensor, training: bool = True) -> Callable[[], object]:
    """One training step without the optimizer, or one inference."""

    def run() -> None:
        with torch.set_grad_enabled(training):
            y = model(x)
            if training:
                y.backward(torch.ones_like(y))
                for parameter in model.parameters():
                    parameter.grad = None
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


def times(steps: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """The first quartile of each step's seconds, all steps in every round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(3):
        for run in steps.values():
            run()
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):
            start = clock()
            steps[name]()
            found[name].append(clock() - start)
    return {name: sorted(values)[len(values) // 4] for name, values in found.items()}


def single_layers() -> Iterator[tuple[str, nn.Module, Tensor, float]]:
    """Name, layer, input, and elements of the weight for each element of the output."""
    for out, into in ((256, 256), (1024, 1024), (4096, 1024), (1000, 2048)):
        for ratio in (256, 64, 16, 8, 4, 2, 1, 0.5):
            tokens = int(into / ratio)
            yield f"Linear {out}x{into}, {tokens} tokens", nn.Linear(into, out), torch.randn(tokens, into), ratio
    for channels, side in ((256, 8), (512, 4), (512, 8), (512, 16)):
        x = torch.randn(1, channels, side, side)
        yield (
            f"Conv 3x3 {channels}, {side}x{side}",
            nn.Conv2d(channels, channels, 3, padding=1),
            x,
            channels * 9 / side**2,
        )


def perceptron(width: int, depth: int) -> nn.Module:
    """A fully connected network as NeRF has it."""
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())))


def transformer_linears(width: int, depth: int) -> nn.Module:
    """The linear layers of a ViT-S, without attention."""
    sizes = [(width, 3 * width), (3 * width, width), (width, 4 * width), (4 * width, width)]
    return nn.Sequential(*(nn.Linear(into, out) for _ in range(depth) for into, out in sizes))


def convolutions() -> nn.Module:
    """Four 3x3 convolutions of 64 to 256 channels."""
    sizes = [(64, 64), (64, 128), (128, 128), (128, 256)]
    return nn.Sequential(*(part for a, b in sizes for part in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())))


def networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, network and input."""
    for batch in (4096, 512, 64):
        yield f"MLP 8x256, batch {batch}", perceptron(256, 8), torch.randn(batch, 256)
    for tokens in (4160, 260, 65):
        yield f"ViT-S linears x2, {tokens} tokens", transformer_linears(384, 2), torch.randn(tokens, 384)
    yield "3x3 convolutions 64-256, 8 images 32x32", convolutions(), torch.randn(8, 64, 32, 32)
    yield "3x3 convolutions 64-256, 1 image 4x4", convolutions(), torch.randn(1, 64, 4, 4)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    own = options.threads == 1 and options.device == "cpu"
    clock = time.process_time if own else time.perf_counter
    torch.manual_seed(0)
    random.seed(0)
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {options.threads} threads, {options.device}"
    )

    paths = ("plain", "weight", "output", "auto")
    print(f"\n{'one layer':32}{'weight/output':>14}" + f"{'plain us':>10}{'weight':>8}{'output':>8}{'auto':>8}" * 2)
    print(f"{'':46}{'training':>34}{'inference':>34}")
    for name, layer, x, ratio in single_layers():
        layer, x = layer.to(options.device), x.to(options.device)
        text = ""
        for training in (True, False):
            steps = {path: step(conditioned(layer, path), x.requires_grad_(training), training) for path in paths}
            found = times(steps, options.rounds, clock)
            text += f"{found['plain'] * 1e6:10.0f}" + "".join(f"{found[p] / found['plain']:8.2f}" for p in paths[1:])
        print(f"{name:32}{ratio:14.1f}{text}", flush=True)

    print(f"\n{'network':44}{'plain ms':>10}{'naive':>8}{'weight':>8}{'output':>8}{'auto':>8}")
    for name, model, x in networks():
        model, x = model.to(options.device), x.to(options.device)
        variants = ("plain", "naive", "weight", "output", "auto")
        found = times({p: step(conditioned(model, p), x) for p in variants}, options.rounds, clock)
        cost = "".join(f"{found[p] / found['plain']:8.2f}" for p in variants[1:])
        print(f"{name:44}{found['plain'] * 1e3:10.2f}{cost}")


if __name__ == "__main__":
    main()
