"""Parametrized weights in two processes train as in one, however their parameters are copied, flattened or sharded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import normkit
from normkit.weights import kernels
from weights_worker import CASES, sample, train

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], list[Tensor]]]:
    folder = tmp_path_factory.mktemp("weights")
    path = os.pathsep.join((str(Path(normkit.__file__).parent.parent), str(TESTS)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(TESTS / "weights_worker.py")]
    ends = [["2", str(folder / "meet"), str(folder / "found")] for _ in range(2)]
    processes = [
        subprocess.Popen([*run, str(rank), *end], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank, end in enumerate(ends)
    ]
    said = [process.communicate(timeout=300)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"found.{rank}") for rank in range(2)]


@pytest.mark.parametrize(("strategy", "method"), CASES)
def test_two_processes_are_one(strategy: str, method: str, found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_functions", lambda: None)  # plain operators
    wanted = train(*sample(method))
    for rank in range(2):
        # Gradients are summed in another order: a few roundings of float64, grown over three steps.
        assert_close(found[rank][strategy, method], [y[rank::2] for y in wanted], rtol=1e-10, atol=1e-12)
