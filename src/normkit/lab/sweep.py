"""Jobs of an experiment, each in its folder: done once, resumed after a stop, in this process or on a Ray cluster.

Several processes given the same jobs and the same folder share them: each job is locked while it is worked on, and who
finds one locked takes another and waits for that one at the end.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol

from normkit.core.errors import OptionError, RecordError
from normkit.lab import record
from normkit.lab.cluster import joined
from normkit.lab.devices import hardware
from normkit.lab.folder import PAUSE, InUseError, locked
from normkit.lab.say import counted
from normkit.lab.schema import NUMBER, OBJECT, TEXT, each, fields, optional
from normkit.lab.seeding import borrowed_randomness, reseed

CONFIG, RESULT, TIMING = "config.json", "result.json", "timing.json"
SPENT = fields(seconds=NUMBER, devices=optional(each(TEXT)))
DONE = fields(config=OBJECT, result=OBJECT)
CURE = "choose another --output, or remove the folder to do this run again"


class Job(Protocol):
    """A frozen dataclass of plain values that says what to do."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def path(self) -> str:
        """The job's folder, relative to that of all runs; unique, with slashes."""
        ...


Function = Callable[[Any, Path], Mapping[str, Any]]


def sweep(
    function: Function,
    jobs: Sequence[Job],
    folder: Path,
    *,
    threads: int = 1,
    ray: str | None = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Does the jobs that are not yet done, and gives the results of all in the order of `jobs`.

    Args:
        function: module-level; see :meth:`normkit.lab.experiment.Bench.sweep`.
        jobs: what to do.
        folder: of the experiment; a job's is ``folder/runs/<path>``.
        threads: of torch, a job. Default: 1.
        ray: None for this process, ``"local"``, or the address of a Ray cluster. Default: None.
        say: is told how many jobs there are, and of every job done. Default: print.

    Raises:
        OptionError: two jobs have one path, or a path leads out of the folder; Ray is asked for but is not there.
        RecordError: a folder holds another job's records, is damaged or not writable.
    """
    places = _places(jobs, folder)
    results: dict[str, dict[str, Any]] = {}
    for job in jobs:
        if (done := finished(function, job, places[job.path])) is not None:
            results[job.path] = done
    waiting = [job for job in jobs if job.path not in results]
    if waiting:
        found = f", {len(results)} found finished" if results else ""
        say(f"{counted(len(jobs), 'run')}{found}; records in {folder}")
        count = _Count(len(jobs), len(results), say)
        if ray is None:
            _in_turn(function, waiting, places, threads, results, count)
        else:
            _on_ray(function, waiting, places, threads, ray, results, count.done)
    return [results[job.path] for job in jobs]


def attend(function: Function, job: Job, place: Path, threads: int) -> dict[str, Any]:
    """Does one job in its folder, unless it is done.

    Args:
        function: what to do.
        job: with what.
        place: its folder.
        threads: of torch.

    Raises:
        InUseError: another process is at it.
    """
    with locked(place):
        if (done := finished(function, job, place)) is not None:
            return done
        config = _config(function, job)
        record.check_config(place / CONFIG, config, CURE)
        started = time.monotonic()
        try:
            with borrowed_randomness(threads):
                # A job that seeds nothing is the same wherever and whenever it is done.
                reseed(0, f"job {job.path}")
                result = function(job, place)
        finally:
            if place.is_dir():
                _spend(place, time.monotonic() - started)
        result = plain(result)
        record.write_json(place / RESULT, {"config": config, "result": result, "sha256": record.digest(result)})
        return record.read_json(place / RESULT)["result"]


def _spend(place: Path, seconds: float) -> None:
    before = record.read_json(place / TIMING, SPENT) if (place / TIMING).exists() else {}
    devices = sorted({*before.get("devices", ()), hardware()})
    record.write_json(place / TIMING, {"seconds": round(before.get("seconds", 0.0) + seconds, 3), "devices": devices})


def hardware_of(jobs: Sequence[Job], folder: Path) -> set[str]:
    """Names what jobs were done on: their own devices, which need not be those of the process that asks.

    Args:
        jobs: done.
        folder: of the experiment.
    """
    timings = [place / TIMING for place in _places(jobs, folder).values()]
    found = [record.read_json(timing, SPENT) for timing in timings if timing.exists()]
    return {device for timing in found for device in timing.get("devices", ())}


def finished(function: Function, job: Job, place: Path) -> dict[str, Any] | None:
    """Reads the result of a job that is done; None where there is work left.

    Raises:
        RecordError: the record is damaged, or of another job.
    """
    if not all((place / name).exists() for name in (CONFIG, RESULT, TIMING)):
        return None
    config = _config(function, job)
    record.check_config(place / CONFIG, config, CURE)
    found = record.read_json(place / RESULT, DONE)
    if found["config"] != config:
        raise RecordError(f"{place / RESULT} is of another run than {place / CONFIG}; {CURE}")
    return found["result"]


def plain(value: Any) -> Any:
    """Makes what JSON can hold: tensors and arrays become lists, tuples lists, infinity and NaN None.

    >>> import torch
    >>> plain({"a": torch.ones(2), "b": (1, float("nan"))})
    {'a': [1.0, 1.0], 'b': [1, None]}
    """
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


class _Count:
    def __init__(self, total: int, found: int, say: Callable[[str], object]) -> None:
        self.total, self.found, self.count, self.say = total, found, found, say
        self.started = time.monotonic()

    def done(self, path: str) -> None:
        self.count += 1
        spent = time.monotonic() - self.started
        left = self.total - self.count
        rest = f"  (about {spent / (self.count - self.found) * left:.0f} s left)" if left else ""
        self.say(f"run {self.count:>{len(str(self.total))}}/{self.total}  {path}{rest}")


def _in_turn(
    function: Function,
    waiting: Sequence[Job],
    places: Mapping[str, Path],
    threads: int,
    results: dict[str, dict[str, Any]],
    count: _Count,
) -> None:
    while waiting:
        busy = []
        for job in waiting:
            try:
                results[job.path] = attend(function, job, places[job.path], threads)
            except InUseError:
                busy.append(job)
            else:
                count.done(job.path)
        if busy and len(busy) == len(waiting):
            time.sleep(PAUSE)
        waiting = busy


def _places(jobs: Sequence[Job], folder: Path) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for job in jobs:
        path = PurePosixPath(job.path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise OptionError(f"job path is {job.path!r}; wanted one within the folder of the runs")
        if job.path in places:
            raise OptionError(f"two jobs have the path {job.path!r}; wanted a path for each")
        places[job.path] = folder / "runs" / path
    return places


def _config(function: Function, job: Job) -> dict[str, Any]:
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', '?')}"
    return {"function": name, **plain(asdict(job))}


def _on_ray(
    function: Function,
    jobs: Sequence[Job],
    places: Mapping[str, Path],
    threads: int,
    address: str,
    results: dict[str, dict[str, Any]],
    done: Callable[[str], object],
) -> None:
    """Does jobs as Ray tasks; their folders must be the same on every machine of the cluster.

    Args:
        function: what to do.
        jobs: with what.
        places: the folder of each job, by its path.
        threads: of torch, a job.
        address: see :func:`joined`.
        results: by path; filled.
        done: is told of every job done.

    Raises:
        OptionError: Ray is not installed, there is no cluster at the address, or none of its machines has that many cores.
        BackendError: the worker of a job was lost again and again; what is done is kept.
    """

    def end(count: int, result: dict[str, Any]) -> None:
        results[jobs[count].path] = result
        done(jobs[count].path)

    with joined(address, threads) as cluster:
        given = [(function, job, places[job.path].absolute(), threads) for job in jobs]
        cluster.spread(_attend, given, [job.path for job in jobs], end)


def _attend(function: Function, job: Job, place: Path, threads: int) -> dict[str, Any]:
    while True:
        try:
            return attend(function, job, place, threads)
        except InUseError:
            time.sleep(PAUSE)
