"""Jobs of an experiment, each in its folder: done once, resumed after a stop, in this process or on a Ray cluster.

Several processes given the same jobs and the same folder share them: each job is locked while it is worked on, and who
finds one locked takes another and waits for that one at the end.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol, TypeVar

from rich.console import Console

from normkit.core.errors import OptionError, RecordError
from normkit.lab import record
from normkit.lab.cluster import joined
from normkit.lab.devices import hardware
from normkit.lab.folder import (
    CHECKPOINT,
    CONFIG,
    PAUSE,
    RESULT,
    RUNS,
    TIMING,
    InUseError,
    discard,
    locked,
    remove,
    waited_for,
)
from normkit.lab.progress import Watch
from normkit.lab.say import counted
from normkit.lab.schema import NUMBER, OBJECT, TEXT, each, fields, optional
from normkit.lab.seeding import borrowed_randomness, reseed

SPENT = fields(seconds=NUMBER, devices=optional(each(TEXT)))
DONE = fields(config=OBJECT, result=OBJECT)
CURE = "choose another --output, or --overwrite to do it again (the code or data changed)"


class Job(Protocol):
    """A frozen dataclass of plain values that says what to do.

    It may have ``label``, what progress calls it in place of its path, and ``files``, names of what a finished one has left next
    to its result.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def path(self) -> str:
        """The job's folder, relative to that of all runs; unique, with slashes."""
        ...


class Work:
    """The base of jobs whose path is a format of their fields.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Training(Work, path="{0.method}/rate={0.rate:g}"):
    ...     method: str
    ...     rate: float
    >>> Training("bn", 0.1).path
    'bn/rate=0.1'
    """

    _path: ClassVar[str] = ""

    def __init_subclass__(cls, path: str = "") -> None:
        super().__init_subclass__()
        cls._path = path or cls._path

    @property
    def path(self) -> str:
        return self._path.format(self)


Function = Callable[[Any, Path], Mapping[str, Any]]
T = TypeVar("T")


class Group:
    """The processes that do each job together; here, one alone."""

    first = True

    def share(self, make: Callable[[], T]) -> T:
        """Gives to all what `make` gives to the first process, which alone calls it."""
        return make()


def sweep(
    function: Function,
    jobs: Sequence[Job],
    folder: Path,
    *,
    threads: int = 1,
    ray: str | None = None,
    say: Callable[[str], object] = print,
    console: Console | None = None,
    group: Group | None = None,
    replaces: bool = False,
) -> list[dict[str, Any]]:
    """Does the jobs that are not yet done, and gives the results of all in the order of `jobs`."""
    places, group = _places(jobs, folder), group or Group()
    results = group.share(lambda: _found(function, jobs, places, folder, replaces))
    waiting = [job for job in jobs if job.path not in results]
    if not waiting:
        return [results[job.path] for job in jobs]
    found = f", {len(results)} found finished" if results else ""
    say(f"{counted(len(jobs), 'run')}{found}; records in {folder}")
    with Watch(len(jobs), len(results), say, console) as watch:

        def end(job: Job, result: dict[str, Any]) -> None:
            results[job.path] = result
            watch.begin(label(job))
            watch.end(label(job), result)

        if ray is None:
            _in_turn(function, waiting, places, threads, group, watch, end)
        else:
            # Folders of jobs must be the same on every machine of the cluster.
            with joined(ray, threads) as cluster:
                given = [(function, job, places[job.path].absolute(), threads) for job in waiting]
                cluster.spread(attend, given, [job.path for job in waiting], lambda n, result: end(waiting[n], result))
    return [results[job.path] for job in jobs]


def attend(function: Function, job: Job, place: Path, threads: int, group: Group | None = None) -> dict[str, Any]:
    """Does one job in its folder, unless it is done; without a group, as on Ray, waits for a process that is at it."""
    config = _config(function, job)
    with ExitStack() as held:
        if group is None:
            group = Group()
            held.enter_context(waited_for(place))
        # The first process alone holds the folder, reads and writes; what it finds, all know.
        elif not group.share(lambda: _hold(held, place)):
            raise InUseError(f"{place} is in use by another process")
        if (done := group.share(lambda: finished(function, job, place))) is not None:
            return done
        group.share(lambda: record.check_config(place / CONFIG, config, CURE))
        started = time.monotonic()
        try:
            with borrowed_randomness(threads):
                # A job that seeds nothing is the same wherever and whenever it is done.
                reseed(0, f"job {job.path}")
                result = plain(function(job, place))
        finally:
            if group.first and place.is_dir():
                _spend(place, time.monotonic() - started)
        written = {"config": config, "result": result, "sha256": record.digest(result)}

        def keep() -> dict[str, Any]:
            record.write_json(place / RESULT, written)
            _clear(place)
            return record.read_json(place / RESULT)["result"]

        return group.share(keep)


def _clear(place: Path) -> None:
    # Only once the result is there: a job stopped in between would be done again from its beginning.
    for path in place.rglob(CHECKPOINT):
        remove(path)


def _hold(held: ExitStack, place: Path) -> bool:
    try:
        held.enter_context(locked(place))
    except InUseError:
        return False
    return True


def _found(
    function: Function, jobs: Sequence[Job], places: Mapping[str, Path], folder: Path, replaces: bool
) -> dict[str, dict[str, Any]]:
    results = {}
    for job in jobs:
        try:
            done = finished(function, job, places[job.path])
        except record.UnlikeError:
            if not replaces:
                raise
            with locked(places[job.path]):
                discard(folder, places[job.path])
            done = None
        if done is not None:
            results[job.path] = done
            _clear(places[job.path])
    return results


def _spent(timing: Path) -> dict[str, Any]:
    return record.read_json(timing, SPENT) if timing.exists() else {}


def _spend(place: Path, seconds: float) -> None:
    before = _spent(place / TIMING)
    devices = sorted({*before.get("devices", ()), hardware()})
    record.write_json(place / TIMING, {"seconds": round(before.get("seconds", 0.0) + seconds, 3), "devices": devices})


def spent_on(job: Job, folder: Path) -> tuple[float, set[str]]:
    """Gives the seconds that a job took, and what it was done on: not this process's devices, its own."""
    found = _spent(_places([job], folder)[job.path] / TIMING)
    return found.get("seconds", 0.0), set(found.get("devices", ()))


def finished(function: Function, job: Job, place: Path) -> dict[str, Any] | None:
    """Reads the result of a job that is done; None where there is work left."""
    if not (place / CONFIG).exists():
        return None
    config = _config(function, job)
    record.check_config(place / CONFIG, config, CURE)
    if not all((place / name).exists() for name in (RESULT, TIMING, *getattr(job, "files", ()))):
        return None
    found = record.read_json(place / RESULT, DONE)
    if found["config"] != config:
        raise RecordError(f"{place / RESULT} is of another run than {place / CONFIG}; {CURE}")
    return found["result"]


def plain(value: Any) -> Any:
    """Makes what JSON can hold: tensors and arrays become lists, tuples lists, infinity and NaN None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | str | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a result holds a {type(value).__name__}; wanted numbers, strings, lists and dicts")


def _in_turn(
    function: Function,
    waiting: Sequence[Job],
    places: Mapping[str, Path],
    threads: int,
    group: Group,
    watch: Watch,
    end: Callable[[Job, dict[str, Any]], None],
) -> None:
    while waiting:
        busy = []
        for job in waiting:
            watch.begin(label(job))
            try:
                end(job, attend(function, job, places[job.path], threads, group))
            except InUseError:
                busy.append(job)
        if busy and len(busy) == len(waiting):
            time.sleep(PAUSE)
        waiting = busy


def label(job: Job) -> str:
    """What progress calls a job: its ``label``, if it has one, else its path."""
    return getattr(job, "label", job.path)


def _places(jobs: Sequence[Job], folder: Path) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for job in jobs:
        path = PurePosixPath(job.path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise OptionError(f"job path is {job.path!r}; wanted one within the folder of the runs")
        if job.path in places:
            raise OptionError(f"two jobs have the path {job.path!r}; wanted a path for each")
        places[job.path] = folder / RUNS / path
    return places


def _config(function: Function, job: Job) -> dict[str, Any]:
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', '?')}"
    return {"function": name, **plain(asdict(job))}
