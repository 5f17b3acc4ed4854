"""A sweep while it runs: what it says of itself, in a live line or plain ones, and how it is asked to stop."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from normkit.lab.say import visible


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


_watching: list["Watch"] = []  # in this process, the innermost last


def tell(done: int, total: int, score: float | None = None) -> None:
    """Shows how far the current job of this process has come; does nothing where nobody watches, as on a worker of Ray."""
    if _watching:
        _watching[-1].part(done, total, score)


class _Lines(Progress):
    """A line of words, as many as it takes, above that of the bar and the times."""

    said = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(visible(self.said), overflow="fold")
        yield self.make_tasks_table(self.tasks)


class Watch:
    """Shows jobs done of all, the current job with its epoch and score, and the time left."""

    def __init__(self, total: int, found: int, say: Callable[[str], object], console: Console | None = None) -> None:
        self.total, self.found, self.done, self.say = total, found, found, say
        self.started = time.monotonic()
        self.name = ""
        self.live: _Lines | None = None
        self.task = TaskID(0)
        if console is not None and (console.is_terminal or console.is_jupyter) and not console.quiet:
            columns = (BarColumn(bar_width=None), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self.live = _Lines(*columns, console=console, transient=True, expand=True)
            self.task = self.live.add_task("", total=total - found)

    def __enter__(self) -> "Watch":
        _watching.append(self)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        _watching.remove(self)
        if self.live:
            self.live.stop()

    def begin(self, name: str) -> None:
        """Starts to show a job."""
        self.name = name
        self._show()

    def part(self, done: int, total: int, score: float | None) -> None:
        """Shows how far the current job is; see :func:`tell`."""
        self._show(f"epoch {done}/{total}" + ("" if score is None else f"  val {score:.3f}"), done / total)

    def end(self, name: str, result: Mapping[str, Any]) -> None:
        """Counts a job as done."""
        self.done += 1
        if self.live:
            self._show()
            return
        left = self.total - self.done
        spent = (time.monotonic() - self.started) / (self.done - self.found) * left
        rest = f"  (about {spent:.0f} s left of this stage)" if left else ""
        self.say(f"run {self.done:>{len(str(self.total))}}/{self.total}  {name}{outcome(result)}{rest}")

    def _show(self, state: str = "", part: float = 0.0) -> None:
        if self.live:
            self.live.said = f"run {min(self.done + 1, self.total)}/{self.total}  {self.name}  {state}"
            self.live.update(self.task, completed=self.done - self.found + part)


def outcome(result: Mapping[str, Any]) -> str:
    """What came of a job, in a word, where its result is that of a training."""
    if result.get("status", "ok") != "ok":
        return f"  {result['status']}"
    score = result.get("val_score")
    return f"  val {score:{'.4f' if abs(score) < 1e5 else '.2e'}}" if isinstance(score, float) else ""
