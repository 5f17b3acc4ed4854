"""Encoders that learn to sort or to continue a text, normalized before or after each branch, and their gradients at the start."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from normkit.lab.data import sequences
from normkit.lab.models.encoder import Encoder
from normkit.lab.seeding import reseed
from normkit.lab.sweep import Work
from normkit.lab.train.walk import Diverged, descend, device, walk
from normkit.residual import Scheme
from normkit.schedules import linear_rate

VOCABULARY, BATCH, HEADS = 16, 32, 4
WARMUP = 0.1
POINTS = 40  # of a loss curve


@dataclass(frozen=True)
class Training:
    """One encoder, task and optimizer."""

    task: str
    placement: Scheme
    norm: str
    optimizer: str
    warmup: bool
    seed: int
    depth: int
    features: int
    length: int
    steps: int

    @property
    def path(self) -> str:
        how = f"{self.optimizer},{'warmup' if self.warmup else 'none'}"
        return f"{self.task}/{self.placement}-{self.norm}/{how}/seed={self.seed}"


@dataclass(frozen=True)
class Start(Work, path="start/{0.placement}/depth={0.depth}/seed={0.seed}"):
    """One encoder before training."""

    placement: Scheme
    depth: int
    features: int
    length: int
    seed: int
    draws: int = 8


def make(task: str, placement: Scheme, norm: str, depth: int, features: int, length: int) -> Encoder:
    """An encoder for a task; the norm ``"scale+fix"`` is ScaleNorm with FixNorm at the embedding and the head."""
    kind, _, fix = norm.partition("+")
    words = len(sequences.text()[1]) if task == "text" else VOCABULARY
    options: dict[str, Any] = {"placement": placement, "norm": kind, "fix": bool(fix), "causal": task == "text"}
    return Encoder(words, length, features, depth, HEADS, **options)


def loss_of(model: Encoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats per token."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains an encoder and keeps its loss along the way; the score is the loss on new sequences at the end."""
    reseed(job.seed, "init")
    model = make(job.task, job.placement, job.norm, job.depth, job.features, job.length).to(device())
    name, _, rate = job.optimizer.partition(" ")
    parameters = list(model.parameters())
    if name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, float(rate), betas=(0.9, 0.98))
    else:
        optimizer = torch.optim.SGD(parameters, float(rate), momentum=0.9)
    warmup = round(WARMUP * job.steps) if job.warmup else 0
    losses: list[float] = []

    def step(number: int) -> dict[str, float] | None:
        for group in optimizer.param_groups:
            group["lr"] = float(rate) * linear_rate(number, warmup)
        tokens, targets = (part.to(device()) for part in sequences.draw(job.task, BATCH, job.length, VOCABULARY))
        loss = loss_of(model, tokens, targets)
        descend(optimizer, loss)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise Diverged
        if number % max(1, job.steps // POINTS):
            return None
        return {"loss": losses[-1]}

    walked = walk(folder, job.steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    reseed(job.seed, "test")
    tokens, targets = (part.to(device()) for part in sequences.draw(job.task, 16 * BATCH, job.length, VOCABULARY))
    with torch.no_grad():
        final = loss_of(model, tokens, targets).item()
    return {"status": walked.status, "rows": walked.rows, "loss": final if math.isfinite(final) else None}


def look(job: Start, folder: Path) -> dict[str, Any]:
    """Measures the gradient of each layer's second feed-forward weight at the start, as means of norms over initial weights.

    ``token`` is of the loss at one place of one sequence, which the theory is about; ``batch`` of the mean over a batch, where
    the gradients of places add up the more, the more alike the places have become.
    """
    found: dict[str, list[list[float]]] = {"token": [], "batch": []}
    for number in range(job.draws):
        reseed(job.seed, "start", number)
        model = make("sort", job.placement, "ln", job.depth, job.features, job.length)
        weights = [layer[2].get_parameter("weight") for layer in model.feed_forwards()]
        tokens, targets = sequences.draw("sort", BATCH, job.length, VOCABULARY)
        logits = model(tokens)
        found["token"].append(gradient_norms(F.cross_entropy(logits[0, :1], targets[0, :1]), weights, keep=True))
        found["batch"].append(gradient_norms(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), weights))
    return {kind: np.mean(norms, axis=0).tolist() for kind, norms in found.items()}


def gradient_norms(loss: Tensor, weights: Sequence[Tensor], keep: bool = False) -> list[float]:
    """The Euclidean norms of a loss's gradients by each of some weights; the graph is kept if asked."""
    return [gradient.norm().item() for gradient in torch.autograd.grad(loss, weights, retain_graph=keep)]
