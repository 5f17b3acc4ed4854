"""A small experiment for the tests: each job counts up to a number, a step at a time, with a checkpoint after each."""

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from normkit.core.card import Paper
from normkit.lab import record
from normkit.lab.experiment import Bench, Drawing, Experiment, Table

PAPER = Paper("Author, An", "A title", 2020, "https://example.org")


@dataclass(frozen=True)
class Walk:
    """A random walk."""

    name: str
    seed: int
    steps: int = 4
    rest: float = 0.0

    @property
    def path(self) -> str:
        return f"{self.name}/seed={self.seed}"


def walk(job: Walk, folder: Path) -> dict[str, Any]:
    """Walks, and remembers after each step how far it has come."""
    path, state = folder / "checkpoint.pt", {"step": 0, "at": 0.0, "pids": []}
    if path.exists():
        state = record.read_checkpoint(path, state)
    for step in range(state["step"], job.steps):
        drawn = torch.randn((), generator=torch.Generator().manual_seed(100 * job.seed + step))
        pids = sorted({*state["pids"], os.getpid()})
        state = {"step": step + 1, "at": state["at"] + float(drawn), "pids": pids}
        record.write_checkpoint(path, state)
        time.sleep(job.rest)
    (folder / "pids").write_text(json.dumps(state["pids"]))  # the checkpoint goes once the result is there
    return {"at": state["at"], "steps": job.steps, "free": random.random()}


def fragile(job: Walk, folder: Path) -> dict[str, Any]:
    """Walks, but the first process that comes to a middle step of seed 1 is killed there."""
    if job.seed == 1 and not (folder / "died").exists():
        half = Walk(job.name, job.seed, job.steps // 2)
        walk(half, folder)
        (folder / "died").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return walk(job, folder)


def doomed(job: Walk, folder: Path) -> dict[str, Any]:
    """Walks, but whoever takes seed 1 is killed."""
    if job.seed == 1:
        time.sleep(job.rest)
        os.kill(os.getpid(), signal.SIGKILL)
    return walk(job, folder)


def run(bench: Bench) -> dict[str, Any]:
    jobs = [Walk(name, seed, bench.epochs or 4) for name in ("left", "right") for seed in bench.seeds]
    ends = bench.sweep(walk, jobs)
    return {"walks": [{"name": job.name, "seed": job.seed, **end} for job, end in zip(jobs, ends, strict=True)]}


def tables(result: dict[str, Any]) -> list[Table]:
    rows = [[walk["name"], walk["seed"], walk["at"]] for walk in result["walks"]]
    return [Table("Walks", ("name", "seed", "end | of it"), [*rows, ["nowhere", 0, None]], ["Ends of <walks>."])]


def figures(result: dict[str, Any]) -> list[Drawing]:
    def make() -> Figure:
        figure = Figure()
        figure.subplots().plot([walk["at"] for walk in result["walks"]])
        return figure

    return [Drawing("far_ends", make, "Where each walk ended, 0 < t & after.")]


def remarks(result: dict[str, Any]) -> list[str]:
    return [f"{len(result['walks'])} walks ended."]


EXPERIMENT = Experiment("walks", "claim", "Random walks", "Walks end & all.", PAPER, run, tables, figures, remarks)
