"""Stopping: a request to end is heard as Ctrl-C is, so that whoever sends one is told how to go on."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stoppable() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt meanwhile, where nobody else listens to it."""
    # Processes of torchrun end as torchrun says: one that waits for another in a collective call would not hear it.
    alone = threading.current_thread() is threading.main_thread() and "TORCHELASTIC_RUN_ID" not in os.environ
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
