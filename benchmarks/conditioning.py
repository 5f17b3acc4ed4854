"""What weight conditioning costs a training step, and where scaling the output overtakes rebuilding the weight.

    python benchmarks/conditioning.py [--threads 1] [--rounds 40] [--device cpu] [--layers] [--output benchmarks/RESULTS.md]

Each variant alternates with the plain network. A ratio is of first quartiles, as noise only adds; its interval is that of 95% of
the median ratio of the pairs. With one thread on a CPU a time is processor time, which others' work does not lengthen. A step is
forward and backward, without the optimizer. 1.00 is the plain network. ``--layers`` shows single layers instead.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from networks import Naive
from normkit.lab.bench.race import race
from normkit.weights.weight_conditioning import weight_conditioning
from page import alternate, how, ratio, said, table, write

TITLE = "Weight conditioning"


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


def single_layers() -> Iterator[tuple[str, nn.Module, Tensor, float]]:
    """Name, layer, input, and elements of the weight for each element of the output."""
    for out, into in ((256, 256), (1024, 1024), (4096, 1024), (1000, 2048)):
        for share in (256, 64, 16, 8, 4, 2, 1, 0.5):
            tokens = int(into / share)
            yield f"Linear {out}x{into}, {tokens} tokens", nn.Linear(into, out), torch.randn(tokens, into), share
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
    for batch in (2048, 512, 64):
        yield f"MLP 8x256, batch {batch}", perceptron(256, 8), torch.randn(batch, 256)
    yield "MLP 4x512, batch 512", perceptron(512, 4), torch.randn(512, 512)
    for tokens in (2080, 260, 65):
        yield f"ViT-S linears x2, {tokens} tokens", transformer_linears(384, 2), torch.randn(tokens, 384)
    yield "3x3 convolutions 64-256, 2 images 32x32", convolutions(), torch.randn(2, 64, 32, 32)
    yield "3x3 convolutions 64-256, 1 image 4x4", convolutions(), torch.randn(1, 64, 4, 4)


def layers(rounds: int, device: str, clock: Callable[[], float]) -> None:
    """Prints each layer, training and inferring."""
    print(f"{'one layer':32}{'weight/output':>14}" + f"{'plain us':>10}{'weight':>8}{'output':>8}{'auto':>8}" * 2)
    print(f"{'':46}{'training':>34}{'inference':>34}")
    for name, layer, x, share in single_layers():
        layer, x = layer.to(device), x.to(device)
        text = ""
        for training in (True, False):
            steps = {
                path: step(conditioned(layer, path), x.requires_grad_(training), training)
                for path in ("plain", "weight", "output", "auto")
            }
            found = race(steps, rounds, clock)
            plain = found.pop("plain")
            text += f"{plain * 1e6:10.0f}" + "".join(f"{seconds / plain:8.2f}" for seconds in found.values())
        print(f"{name:32}{share:14.1f}{text}", flush=True)


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", default="", help="those whose names contain this")
    parser.add_argument("--layers", action="store_true", help="single layers instead of networks")
    parser.add_argument("--output", type=Path, help=f"a Markdown file whose section '{TITLE}' is replaced")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    own = options.threads == 1 and options.device == "cpu"
    clock = time.process_time if own else time.perf_counter
    torch.manual_seed(0)
    if options.layers:
        return layers(options.rounds, options.device, clock)
    found: dict[str, dict[str, list[float | None]]] = {}
    rows = []
    for name, model, x in networks():
        if options.networks not in name:
            continue
        model, x = model.to(options.device), x.to(options.device)
        found[name], plain = {}, step(conditioned(model, "plain"), x)
        for variant in ("naive", "weight", "output", "auto"):
            seconds, plains = alternate(step(conditioned(model, variant), x), plain, options.rounds, clock)
            found[name][variant] = ratio(seconds, plains)
        rows.append([name, *map(said, found[name].values())])
        print(" | ".join(rows[-1]), flush=True)
    text = (
        f"{how(f'python benchmarks/conditioning.py --rounds {options.rounds}')} What a training step takes with every linear or "
        "convolutional layer in row mode, over the step of plain layers, with the interval: `naive` is autograd through the "
        "definition, `weight` and `output` the two exact forms, `auto` the choice per call. The goal is 1.02, and 1.06 where "
        f"weights dominate.\n\n{table(('network', 'naive', 'weight', 'output', 'auto'), rows)}"
    )
    write(options.output, TITLE, text, found)


if __name__ == "__main__":
    main()
