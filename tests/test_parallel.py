"""Two processes on the CPU train as one does, with copies of the model and with shards, stopped or not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from normkit.lab import record
from parallel_worker import CASES, train

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(TESTS / "parallel_worker.py"), str(out)]
    path = os.pathsep.join(map(str, (TESTS.parent / "src", TESTS)))
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def numbers(out: Path) -> list[Any]:
    rows = record.read_lines(out / "metrics.jsonl")
    kept = [row[key] for row in rows for key in ("train_loss", "val_loss", "val_score")]
    conditions = [value for row in rows for pair in row["condition"].values() for value in pair]
    result = record.read_json(out / "result.json")
    return [*kept, *conditions, result["test_loss"], result["test_score"]]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(tmp_path: Path, two: Path, name: str) -> None:
    _, recipe, _, least = CASES[name]
    train(tmp_path, "auto", recipe, least)
    # Sums in another order: a few units in the last place of single precision, grown over the steps.
    assert numbers(two / name) == pytest.approx(numbers(tmp_path), rel=1e-4)


def test_resumed_shards_are_exact(two: Path) -> None:
    for name in ("metrics.jsonl", "result.json"):
        assert (two / "resumed shards" / name).read_bytes() == (two / "shards" / name).read_bytes()
