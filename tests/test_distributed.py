"""Every layer and parametrization, trained by two processes, against one process that averages what both would find."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import normkit

Report = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """What each process found, for each mode the layers with what was wrong; started once for all modes."""
    folder = tmp_path_factory.mktemp("distributed")
    here = Path(__file__)
    paths = [str(Path(normkit.__file__).parent.parent), str(here.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    worker = str(here.with_name("distributed_worker.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(folder / "meet"), str(folder / "found")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"found{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("mode", ["DDP", "FSDP1", "FSDP1, use_orig_params", "FSDP2"])
def test_two_processes_train_as_one(mode: str, reports: list[Report]) -> None:
    for report in reports:
        assert len(report[mode]) > 50
        wrong = [f"{name}: {text}" for name, text in report[mode].items() if text]
        assert not wrong, "\n".join(wrong)
