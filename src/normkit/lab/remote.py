"""Where the runs of a comparison are trained: in this process, or on the workers of a Ray cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from normkit.lab.cluster import Cluster
from normkit.lab.devices import device_name, environment
from normkit.lab.folder import waited_for
from normkit.lab.progress import Watch
from normkit.lab.seeding import borrowed_randomness
from normkit.lab.settings import Settings
from normkit.lab.study import Study
from normkit.lab.train.fabric import start_fabric
from normkit.lab.train.trainer import Run


@dataclass(frozen=True)
class Distant:
    """A comparison as a worker must know it.

    Args:
        settings: canonical.
        folder: of the comparison, the same on every machine.
        threads: of torch.
        model: a factory in place of the one that the settings name; None for that one.
        data: likewise.
        tensorboard: write curves.
        replaces: see :class:`~normkit.lab.study.Study`.
    """

    settings: Settings
    folder: Path
    threads: int
    model: Callable[..., Any] | None = None
    data: Callable[[], Any] | None = None
    tensorboard: bool = False
    replaces: bool = False


def train(distant: Distant, run: Run) -> dict[str, Any]:
    """Trains or resumes a run and returns its result."""
    with borrowed_randomness(distant.threads), waited_for(distant.folder / run.path):
        return _study(distant).train(run, _quiet())


def costs(distant: Distant) -> dict[str, dict[str, Any]]:
    """Measures every recipe's step."""
    with borrowed_randomness(distant.threads):
        return _study(distant).costs(_quiet())


def describe(distant: Distant, started: str) -> tuple[str, dict[str, Any]]:
    """Gives the device of a worker, and its environment."""
    fabric = start_fabric(distant.settings)
    with borrowed_randomness(distant.threads):
        return device_name(fabric), environment(fabric, started)


class Here:
    """Trains in this process, one run after the other."""

    side_by_side = False

    def __init__(self, study: Study) -> None:
        self.study = study

    def train(self, runs: Sequence[Run], watch: Watch, trained: Callable[[], None]) -> None:
        """Trains or resumes runs; calls `trained` after each."""
        for run in runs:
            self.study.train(run, watch)
            trained()

    def costs(self, watch: Watch) -> dict[str, dict[str, Any]]:
        """Measures every recipe's step."""
        return self.study.costs(watch)


class There:
    """Trains on a cluster, as many runs at once as there is room for."""

    side_by_side = True

    def __init__(self, study: Study, cluster: Cluster, distant: Distant) -> None:
        self.study, self.cluster, self.distant = study, cluster, distant

    def train(self, runs: Sequence[Run], watch: Watch, trained: Callable[[], None]) -> None:
        """Trains or resumes runs; calls `trained` after each."""
        left = []
        for run in runs:
            if (found := self.study.found(run)) is None:
                left.append(run)
            else:
                watch.begin(run)
                watch.end(run, found["status"], found["val_score"], True)

        def done(place: int, result: dict[str, Any]) -> None:
            watch.begin(left[place])
            watch.epoch(left[place], self.study.settings.epochs, None)
            watch.end(left[place], result["status"], result["val_score"], False)
            trained()

        self.cluster.spread(train, [(self.distant, run) for run in left], [run.path for run in left], done)

    def costs(self, watch: Watch) -> dict[str, dict[str, Any]]:
        """Measures every recipe's step."""
        watch.stage("measuring milliseconds and megabytes a step on a worker, all recipes side by side")
        return self.cluster.call(costs, self.distant)


# A worker does run after run of one comparison.
@lru_cache(maxsize=1)
def _study(distant: Distant) -> Study:
    curves = distant.folder / "tensorboard" if distant.tensorboard else None
    fabric = start_fabric(distant.settings)
    made = (distant.model, distant.data, curves)
    return Study(distant.settings, fabric, distant.folder, *made, replaces=distant.replaces)


def _quiet() -> Watch:
    return Watch(Console(quiet=True), 1, 1)
