"""Runs a comparison in children that are killed at instants of all sorts, until one comes to its end.

Children are forked, so that torch is imported once. Each dies beside a file operation drawn by lot, or when a drawn time is
over, whichever comes first.
"""

import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace

import scipy.stats  # noqa: F401, imported here once, not in each child
import torch

import lab_samples
from normkit.diagnostics.conditioning import weight_conditions  # noqa: F401
from normkit.lab.comparison import compare
from normkit.lab.report import drawing, page, sheet, table, wording  # noqa: F401
from normkit.surgery.recipe import apply_recipe  # noqa: F401

SETTINGS = replace(
    lab_samples.SMALL,
    model="lab_samples:model",
    data="lab_samples:data",
    recipes=("keep", "keep+e@first_last"),
    epochs=6,
)
FILE_OPERATIONS = ("fsync", "replace")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_beside(operation: str, count: int, after: bool) -> None:
    """Dies before or after the `count`-th call of a file operation by the records."""
    real = getattr(os, operation)
    left = count

    def counted(*args: object, **options: object) -> object:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            die()
        result = real(*args, **options)
        if left == 0:
            die()
        return result

    setattr(os, operation, counted)


def child(folder: str, draw: random.Random | None) -> None:
    if draw is not None:
        die_beside(draw.choice(FILE_OPERATIONS), draw.randint(1, 40), draw.random() < 0.5)
    torch.set_num_threads(1)
    compare(SETTINGS, folder, report=False, model=lab_samples.model, data=lab_samples.data)


def wait(pid: int, seconds: float) -> int:
    """Waits for a child, and kills it when its time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def main(folder: str, seed: str, kills: str) -> None:
    """Kills as often as told, then lets a child come to its end."""
    draw = random.Random(int(seed))
    killed = 0
    while True:
        last = killed == int(kills)
        instant = draw.uniform(0.1, 0.8)  # drawn before the fork, so that the child's draws differ each time
        pid = os.fork()
        if pid == 0:
            try:
                child(folder, None if last else draw)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        status = wait(pid, 300.0 if last else instant)
        if not os.WIFSIGNALED(status):
            print(f"killed {killed}")
            sys.exit(os.WEXITSTATUS(status))
        killed += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
