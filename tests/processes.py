"""Processes of the distributed tests, which meet by a file or by torchrun: what they find."""

import datetime
import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import normkit

PATHS = [str(Path(normkit.__file__).parent.parent), str(Path(__file__).parent)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}


def run_together(work: str, count: int, folder: Path, given: Any = None) -> list[Any]:
    """What ``module:function``, given something, returns in each of some processes of one group."""
    torch.save(given, folder / "given")
    command = [sys.executable, __file__, work, str(folder), str(count)]
    how: dict[str, Any] = {"env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank)], **how) for rank in range(count)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(count)]


def torchrun(module: str, *words: str, folder: Path) -> str:
    """What a module prints that torchrun starts in two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    run += ["--rdzv-endpoint", "localhost:0", "-m", module, *words]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def main(work: str, folder: str, count: str, rank: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    patience, meet = datetime.timedelta(seconds=60), f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=int(rank), world_size=int(count), timeout=patience)
    module, _, name = work.partition(":")
    found = getattr(import_module(module), name)(torch.load(f"{folder}/given", weights_only=False))
    torch.save(found, f"{folder}/found{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
