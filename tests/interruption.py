"""Stops in the middle: at the n-th call of a function, and in a child process that may be killed."""

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Stop(BaseException):
    """Stands for an interruption."""


def stop() -> None:
    raise Stop


@contextmanager
def at_call(owner: Any, name: str, count: int, act: Callable[[], Any] = stop, *, after: bool = False) -> Iterator[None]:
    """Acts before the n-th call of a function that others look up there, or after it; the calls beyond go on."""
    real, left = getattr(owner, name), count

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            act()
        result = real(*given, **options)
        if left == 0 and after:
            act()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield


def forked(call: Callable[[], object]) -> int:
    """How a child process ends that makes the call: 0, 1 after an exception, or minus the number of the signal that killed it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads beside a fork
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
