"""Workers of the distributed tests: processes that meet by a file, started together."""

import os
import subprocess
import sys
from pathlib import Path

import normkit

TESTS = Path(__file__).parent


def run_together(worker: str, count: int, folder: Path, *arguments: str) -> None:
    """Starts ``worker RANK RENDEZVOUS arguments`` that many times, and waits until all have ended well."""
    paths = [str(Path(normkit.__file__).parent.parent), str(TESTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / worker)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "meet"), *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
