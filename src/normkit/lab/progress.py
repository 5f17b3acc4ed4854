"""What a comparison says of itself while it runs: a live line in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from normkit.lab.say import say, visible
from normkit.lab.train.trainer import DIVERGED, Run


class _Lines(Progress):
    """A line of words, as many as it takes, above that of the bar and the times."""

    said = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(visible(self.said), overflow="fold")
        yield self.make_tasks_table(self.tasks)


class Watch:
    """Shows runs done of all, the current recipe, rate, seed, epoch and score, and the time left.

    Args:
        console: where; quiet for processes other than the first.
        runs: how many the comparison has.
        epochs: of a run.
    """

    def __init__(self, console: Console, runs: int, epochs: int) -> None:
        self.console, self.runs, self.epochs = console, runs, epochs
        self.done = self.trained = self.begun = 0
        self.started = time.monotonic()
        self.live: _Lines | None = None
        self.task = TaskID(0)
        if console.is_terminal and not console.quiet:
            columns = (BarColumn(bar_width=None), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self.live = _Lines(*columns, console=console, transient=True, expand=True)
            self.task = self.live.add_task("", total=runs * epochs)

    def __enter__(self) -> "Watch":
        """Starts the live line."""
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the live line away."""
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        say(self.console, text)

    def stage(self, text: str) -> None:
        """Says what goes on between runs."""
        if self.live:
            self.live.said = text
        else:
            self.say(text)

    def begin(self, run: Run) -> None:
        """Starts to show a run."""
        self.begun = 0
        self._describe(run, "")

    def epoch(self, run: Run, epoch: int, score: float | None) -> None:
        """Shows an epoch's end."""
        self.trained += epoch - self.begun
        if self.live:
            self.live.advance(self.task, epoch - self.begun)
        self.begun = epoch
        self._describe(run, f"epoch {epoch}/{self.epochs}  val {score:.3f}" if score is not None else "")

    def end(self, run: Run, status: str, score: float | None, found: bool) -> None:
        """Counts a run as done; `found` when an earlier session had finished it."""
        self.done += 1
        if self.live:
            self.live.advance(self.task, self.epochs - self.begun)
            return
        outcome = "diverged" if status == DIVERGED else f"val {score:.4f}"
        past = "  (found finished)" if found else self._left()
        self.say(f"run {self.done:>{len(str(self.runs))}}/{self.runs}  {_name(run)}  {outcome}{past}")

    def _describe(self, run: Run, state: str) -> None:
        if self.live:
            self.live.said = f"run {self.done + 1}/{self.runs}  {_name(run)}  {state}"

    def _left(self) -> str:
        if not self.trained:
            return ""
        seconds = (time.monotonic() - self.started) / self.trained * self.epochs * (self.runs - self.done)
        return f"  (about {seconds:.0f} s left)"


def _name(run: Run) -> str:
    return f"{run.recipe}  rate {run.rate:g}  seed {run.seed}"
