"""A training step and an inference of whole networks: eager, compiled, with `normkit.accelerate`, with both.

    python benchmarks/end_to_end.py [--networks resnet,llama] [--rounds 9] [--threads N] [--output benchmarks/RESULTS.md]

Every variant runs in each round, in shuffled order, in one process; a time is the first quartile over rounds, an interval that of
95% of the median ratio of a round. With one thread it is processor time. The share of the norms is what a step saves with an
identity in the place of each: no faster norm can gain more. Networks that are in the record already, measured alike, are not
measured again without --overwrite.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from networks import NETWORKS, Field, made
from normkit.lab.bench.race import quartile, samples
from normkit.lab.memory import peak_bytes
from normkit.weights.weight_conditioning import weight_conditioning
from page import earlier, how, only, ratio, said, table, write

TITLE = "End to end"
TIMED = tuple(name for name in NETWORKS if name != "densenet")
PEERS = ("compiled", "accelerated", "both")


def accelerated(model: nn.Module) -> nn.Module:
    """A copy with its norms, or what conditions its weights, handed to normkit."""
    return Field(weight_conditioning) if isinstance(model, Field) else nk.accelerate(copy.deepcopy(model)).model


def bare(model: nn.Module) -> nn.Module:
    """A copy without what is measured: an identity for each norm, or plain weights."""
    if isinstance(model, Field):
        return Field(lambda layer: None)
    model = copy.deepcopy(model)
    for change in nk.accelerate(copy.deepcopy(model)):
        model.set_submodule(change.layer, nn.Identity())
    return model


def step(model: nn.Module, x: Tensor, training: bool) -> Callable[[], object]:
    model = model.train(training)

    def infer() -> None:
        with torch.no_grad():
            model(x)

    def learn() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return learn if training else infer


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Times and peaks of one network, training and inferring."""
    model, x = made(name)
    found: dict[str, Any] = {"title": NETWORKS[name].title}
    for direction, training in (("training", True), ("inference", False)):
        torch._dynamo.reset()
        ours = accelerated(model)
        variants = {
            "eager": model,
            "compiled": torch.compile(copy.deepcopy(model)),
            "accelerated": ours,
            "both": torch.compile(copy.deepcopy(ours)),
            "bare": bare(model),
        }
        runs = {key: step(variant, x, training) for key, variant in variants.items()}
        start = time.perf_counter()
        for key, run in runs.items():
            print(f"{name}, {direction}: {key}", flush=True)
            run()
        prepared = time.perf_counter() - start
        times = samples(runs, rounds, time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
        share = 1 - quartile(times["bare"]) / quartile(times["eager"])
        found[direction] = {"ms": quartile(times["eager"]) * 1e3, "share": share, "compiling_seconds": prepared}
        found[direction] |= {peer: ratio(times["eager"], times[peer]) for peer in PEERS}
        if training:
            for key, each in (("eager", model), ("accelerated", ours)):
                each.zero_grad()
                found[f"peak_{key}"] = peak_bytes(runs[key], x.device)
    return found


def row(found: dict[str, Any]) -> list[str]:
    """One line of the table, training; inference: a ratio above 1 is a gain."""
    both = [found["training"], found["inference"]]
    cells = ["; ".join(f"{own['ms']:.1f}" for own in both)]
    for peer in PEERS:
        cells.append("; ".join(said(own[peer][: 3 if peer == "accelerated" else 1]) for own in both))
    cells.append("; ".join(f"{own['share']:.0%}" for own in both))
    return [found["title"], *cells, "; ".join(f"{found[f'peak_{key}'] / 1e6:.0f}" for key in ("eager", "accelerated"))]


def nothing_gained(results: dict[str, Any]) -> str:
    """Which steps accelerate does not make faster, and by how much it could."""
    flat = []
    for found in results.values():
        for direction in ("training", "inference"):
            own = found[direction]
            middle, low, _ = own["accelerated"]
            if (low or middle) <= 1:
                limit = 1 / (1 - own["share"]) if 0 < own["share"] < 1 else 1.0
                flat.append(f"{found['title'].split(',')[0]} {direction} (at most {limit:.2f})")
    if not flat:
        return "Every step is faster by itself."
    return (
        "Nothing beyond noise is gained by the norms alone in: "
        + ", ".join(flat)
        + ". In brackets what a norm that takes no "
        "time would gain: matrix products and convolutions, which are the same in both, take the rest."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="", help=f"some of {','.join(TIMED)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help=f"a Markdown file whose section '{TITLE}' is replaced")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    alike = {"rounds": options.rounds, "threads": torch.get_num_threads(), "torch": torch.__version__}
    text, results = "", {name: found for name, found in earlier(options.output, TITLE).items() if found["how"] == alike}
    for number, name in enumerate(chosen := only(options.networks, dict.fromkeys(TIMED)), 1):
        if options.overwrite or name not in results:
            print(f"[{number}/{len(chosen)}] {NETWORKS[name].title}", flush=True)
            results[name] = {**measure(name, options.rounds), "how": alike}
        results = {name: results[name] for name in TIMED if name in results}
        columns = ("network", "eager ms", *PEERS, "norms' share", "peak MB, eager; accelerated")
        command = f"python benchmarks/end_to_end.py --rounds {options.rounds}" + (
            f" --threads {options.threads}" if options.threads else ""
        )
        text = (
            f"{how(command)} Training step; inference: eager time over that of `torch.compile`, of `normkit.accelerate` with the "
            "interval, and of both (above 1 is a gain); the norms' share of eager time; the peak of the training step.\n\n"
            f"{table(columns, [row(found) for found in results.values()])}\n\n{nothing_gained(results)}"
        )
        write(options.output, TITLE, text, results)
    print(text)


if __name__ == "__main__":
    main()
