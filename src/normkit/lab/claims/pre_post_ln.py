"""Layer normalization after each residual branch or before it: which trains without a warm-up, and the gradients at the start.

Encoders of twelve layers turn sequences into others and predict the next character of a text, with the norm after (Post-LN) or
before (Pre-LN) each branch, with and without a linear warm-up over a tenth of the steps, by Adam at two rates and by SGD. In some
RMSNorm, ScaleNorm, or ScaleNorm with FixNorm takes layer normalization's place. Before training, the gradient of each layer's
second feed-forward weight is measured at depths 2 to 16.

Ours: Adam with beta (0.9, 0.98); SGD at 0.1 with momentum 0.9; after warm-up the rate is constant; no clipping, dropout or decay.
The text is the first two chapters of "Alice's Adventures in Wonderland" (1865). At small scale the width is 32 and the
length 16, in place of 128 and 32. An epoch of ``--epochs`` is 20 steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from normkit.core.card import Paper
from normkit.lab.claims.numbers import ABSENT, choose, mean, spread
from normkit.lab.claims.pre_post_ln_drawing import NORMS, OPTIMIZERS, PLACEMENTS, draw
from normkit.lab.claims.steps import OK, Diverged, device, forget, walk
from normkit.lab.data import sequences
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.interval import differences, tell
from normkit.lab.models.encoder import Encoder
from normkit.lab.seeding import reseed
from normkit.residual import Placement
from normkit.schedules import linear_rate

SIZES: dict[str, dict[str, int]] = {
    "small": {"depth": 12, "features": 32, "length": 16, "steps": 240},
    "full": {"depth": 12, "features": 128, "length": 32, "steps": 4000},
}
VOCABULARY, BATCH, HEADS = 16, 32, 4
WARMUP = 0.1
POINTS = 40  # of a loss curve
DEPTHS = (2, 4, 8, 16)
LEARNT = 0.9


@dataclass(frozen=True)
class Training:
    """One encoder, task and optimizer."""

    task: str
    placement: Placement
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
        """The folder."""
        how = f"{self.optimizer},{'warmup' if self.warmup else 'none'}"
        return f"{self.task}/{self.placement}-{self.norm}/{how}/seed={self.seed}"


@dataclass(frozen=True)
class Start:
    """One encoder before training."""

    placement: Placement
    depth: int
    features: int
    length: int
    seed: int
    draws: int = 8

    @property
    def path(self) -> str:
        """The folder."""
        return f"start/{self.placement}/depth={self.depth}/seed={self.seed}"


def make(task: str, placement: Placement, norm: str, depth: int, features: int, length: int) -> Encoder:
    """An encoder for a task; the norm ``"scale+fix"`` is ScaleNorm with FixNorm at the embedding and the head."""
    kind, _, fix = norm.partition("+")
    words = len(sequences.text()[1]) if task == "text" else VOCABULARY
    options: dict[str, Any] = {"placement": placement, "norm": kind, "fix": bool(fix), "causal": task == "text"}
    return Encoder(words, length, features, depth, HEADS, **options)


def loss_of(model: Encoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats a token."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains an encoder and keeps its loss along the way; the score is the loss on sequences drawn anew at the end."""
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
        optimizer.zero_grad()
        loss = loss_of(model, tokens, targets)
        loss.backward()
        optimizer.step()
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
    forget(folder)
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
    """The Euclidean norms of a loss's gradients by each of some weights; the graph is kept if asked.

    >>> first, second = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    >>> gradient_norms(second * first * 5, [first, second])
    [15.0, 10.0]
    """
    return [gradient.norm().item() for gradient in torch.autograd.grad(loss, weights, retain_graph=keep)]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of the power law y ~ x^p, by least squares of the logarithms.

    >>> round(slope([1, 4, 16], [8, 4, 2]), 6)
    -0.5
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plan(small: bool) -> list[dict[str, Any]]:
    """What is trained with each seed: every optimizer and warm-up on sort, some on the other tasks, and the other norms."""
    found = [
        {"task": task, "placement": placement, "norm": "ln", "optimizer": optimizer, "warmup": warmup}
        for task in (("sort", "text") if small else sequences.TASKS)
        for optimizer in (OPTIMIZERS if task == "sort" or not small else list(OPTIMIZERS)[:1])
        for warmup in (False, True)
        for placement in PLACEMENTS
    ]
    return found + [
        {"task": "sort", "placement": placement, "norm": norm, "optimizer": "adam 1e-3", "warmup": False}
        for norm in NORMS
        if norm != "ln"
        for placement in PLACEMENTS
    ]


def run(bench: Bench) -> dict[str, Any]:
    """Trains what the scale asks for, and measures gradients at the start."""
    size: dict[str, Any] = dict(SIZES[bench.scale])
    size["steps"] = 20 * bench.epochs if bench.epochs else size["steps"]
    plans = plan(bench.scale == "small")
    jobs = [Training(**one, seed=seed, **size) for seed in bench.seeds for one in plans]
    starts = [
        Start(placement, depth, size["features"], size["length"], seed)
        for seed in bench.seeds
        for depth in DEPTHS
        for placement in PLACEMENTS
    ]
    looks = bench.sweep(look, starts)
    runs = bench.sweep(train, jobs)
    keys = ("task", "placement", "norm", "optimizer", "warmup", "seed")
    return {
        "runs": [{**{key: getattr(job, key) for key in keys}, **done} for job, done in zip(jobs, runs, strict=True)],
        "starts": [
            {"placement": job.placement, "depth": job.depth, "seed": job.seed, **done}
            for job, done in zip(starts, looks, strict=True)
        ],
        "guess": {
            task: sequences.guess(task, VOCABULARY) for task in sequences.TASKS if any(job.task == task for job in jobs)
        },
        **size,
    }


def state(runs: Sequence[Any], guess: float) -> str:
    """Mean loss at the end and its spread, and how many runs diverged or learned next to nothing."""
    lost = sum(run["status"] != OK for run in runs)
    flat = sum(run["status"] == OK and (run["loss"] or 0.0) > LEARNT * guess for run in runs)
    notes = [f"{lost} diverged"] if lost else []
    notes += [f"{flat} of {len(runs)} flat"] if flat else []
    return spread([run["loss"] for run in runs if run["status"] == OK]) + (f"; {', '.join(notes)}" if notes else "")


def tables(result: dict[str, Any]) -> list[Table]:
    """Losses at the end, and gradients at the start."""
    found = []
    for task, guess in result["guess"].items():
        rows: list[list[Any]] = []
        for optimizer, title in OPTIMIZERS.items():
            for warmup in (False, True):
                cells = [
                    choose(result["runs"], task=task, norm="ln", placement=p, optimizer=optimizer, warmup=warmup)
                    for p in PLACEMENTS
                ]
                if any(cells):
                    rows.append([f"{title}, {'10 %' if warmup else 'none'}", *(state(runs, guess) for runs in cells)])
        notes = [
            f"Nats a token after {result['steps']} steps, mean ± standard deviation over seeds; {guess:.3f} is had by "
            f"knowing frequencies alone, and more than {LEARNT:g} of it counts as flat. {result['depth']} layers of width "
            f"{result['features']}."
        ]
        found.append(Table(f"Loss on {task}", ("optimizer, warm-up", *PLACEMENTS.values()), rows, notes))
    rows = []
    for norm, title in NORMS.items():
        cells = [
            choose(result["runs"], task="sort", norm=norm, placement=p, optimizer="adam 1e-3", warmup=False)
            for p in PLACEMENTS
        ]
        rows.append([title, *(state(runs, result["guess"]["sort"]) for runs in cells)])
    found.append(Table("Other norms, on sort, Adam 1e-3 without warm-up", ("norm", *PLACEMENTS.values()), rows))
    columns = [f"{name}, {what}" for what in ("token", "batch") for name in PLACEMENTS.values()]
    which = [(placement, what) for what in ("token", "batch") for placement in PLACEMENTS]
    rows = [[depth, *(cell_of(result, *key, depth) for key in which)] for depth in DEPTHS]
    rows.append(["exponent", *(spread(exponents(result, *key), ".2f") for key in which)])
    rows.append(["theory", "0", "-0.5", None, None])
    title = "Gradient of the last layer's second feed-forward weight before training"
    notes = [
        "Euclidean norm, of the loss at one token, as in the theory, and of the mean loss of a batch; mean over 8 initial "
        "weights a seed. The exponent p of depth^p is fitted for each seed."
    ]
    return [*found, Table(title, ("depth", *columns), rows, notes)]


def cell_of(result: dict[str, Any], placement: str, what: str, depth: int) -> str:
    """The gradient of the last layer, over seeds."""
    starts = choose(result["starts"], placement=placement, depth=depth)
    return spread([start[what][-1] for start in starts], ".2f")


def exponents(result: dict[str, Any], placement: str, what: str) -> list[float]:
    """With what power of the depth the last layer's gradient goes, for each seed."""
    starts = choose(result["starts"], placement=placement)
    by_seed = [[s for s in starts if s["seed"] == seed] for seed in sorted({s["seed"] for s in starts})]
    return [slope([s["depth"] for s in some], [s[what][-1] for s in some]) for some in by_seed]


def remarks(result: dict[str, Any]) -> list[str]:
    """What was seen of each part of the claim."""
    said = []
    for what, how in (("token", "of the loss at one token"), ("batch", "of the mean loss of a batch")):
        post, pre = (mean(exponents(result, placement, what)) or 0.0 for placement in ("post", "pre"))
        theory = " (theory 0 and -0.5)" if what == "token" else ""
        said.append(
            f"Before training, the last layer's gradient {how} goes as depth^{post:.2f} with Post-LN and as depth^{pre:.2f} with "
            f"Pre-LN{theory}."
        )
    failed = []
    for task, guess in result["guess"].items():
        for optimizer, title in OPTIMIZERS.items():
            words = []
            for placement, name in PLACEMENTS.items():
                wanted = {"task": task, "norm": "ln", "placement": placement, "optimizer": optimizer}
                both = [choose(result["runs"], **wanted, warmup=warmup) for warmup in (False, True)]
                if not all(both):
                    continue
                words.append(f"{name} {warming(*both)}")
                failed += [
                    f"{name} on {task} with {title}, {how} warm-up"
                    for how, runs in zip(("no", "10 %"), both, strict=True)
                    if all(run["status"] != OK or (run["loss"] or math.inf) > LEARNT * guess for run in runs)
                ]
            if words:
                said.append(f"{task.capitalize()}, {title}: {'; '.join(words)}.")
    said.append(f"Learned next to nothing in any seed: {'; '.join(failed) or ABSENT}.")
    return said


def warming(without: Sequence[Mapping[str, Any]], withal: Sequence[Mapping[str, Any]]) -> str:
    """What a warm-up did to the loss at the end, seed by seed."""
    lost = [sum(run["status"] != OK or run["loss"] is None for run in runs) for runs in (without, withal)]
    if any(lost):
        return f"diverged in {lost[0]} of {len(without)} seeds without warm-up and {lost[1]} of {len(withal)} with"
    before, after = ([run["loss"] for run in runs] for runs in (without, withal))
    change = differences(after, before)
    lower = sum(difference < 0 for difference in change.differences)
    text = f"ends at {mean(before):.2f} without warm-up and {mean(after):.2f} with, lower in {lower} of {len(before)} seeds"
    return text if change.low is None else f"{text}, a change of {tell(change)}"


EXPERIMENT = Experiment(
    name="pre-post-ln",
    kind="claim",
    title="Layer normalization before or after each branch of a transformer",
    claim=(
        "With layer normalization after each residual branch the gradients of the last layers are large at the start and a "
        "warm-up is needed; before each branch they shrink with the root of the depth, and it is not."
    ),
    paper=Paper(
        "Xiong, Ruibin and Yang, Yunchang and He, Di and Zheng, Kai and Zheng, Shuxin and Xing, Chen and others",
        "On Layer Normalization in the Transformer Architecture",
        2020,
        "https://arxiv.org/abs/2002.04745",
    ),
    run=run,
    tables=tables,
    draw=draw,
    remarks=remarks,
)
