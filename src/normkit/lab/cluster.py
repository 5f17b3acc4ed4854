"""Work as tasks of a Ray cluster: each with its cores, and tried again from its checkpoint when its worker is lost."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normkit.core.errors import NormkitError, OptionError
from normkit.lab import record
from normkit.lab.sweep import Function, Job, attend

LOCAL = "local"
RETRIES = 5
PASSED_ON = ("NORMKIT_DATA", "PYTHONPATH")


class Cluster:
    """A Ray cluster, joined.

    A task takes `threads` cores, and a GPU where the cluster has some. A task whose worker process or machine is lost is
    given to another.

    Args:
        ray: the module.
        threads: of torch, a task.
    """

    def __init__(self, ray: Any, threads: int) -> None:
        self.ray = ray
        self.needs = {"num_cpus": threads, "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0}

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """Calls a function on a worker."""
        return self.spread(function, [given])[0]

    def spread(
        self,
        function: Callable[..., Any],
        given: Sequence[tuple[Any, ...]],
        done: Callable[[int, Any], object] = lambda *_: None,
    ) -> list[Any]:
        """Calls a function many times, as many at once as there is room for.

        Args:
            function: module-level.
            given: the arguments of each call.
            done: is told of every call that ends, with its place among `given` and its result. Default: nobody.

        Returns:
            The results in the order of `given`.

        Raises:
            NormkitError: as the function raised it.
        """
        task = self.ray.remote(**self.needs, max_retries=RETRIES)(function)
        pending = {task.remote(*each): place for place, each in enumerate(given)}
        results: list[Any] = [None] * len(given)
        try:
            while pending:
                for reference in self.ray.wait(list(pending))[0]:
                    place = pending.pop(reference)
                    results[place] = self._result(reference)
                    done(place, results[place])
        except BaseException:
            for reference in pending:
                self.ray.cancel(reference, force=True)
            raise
        return results

    def _result(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NormkitError):
                raise error.cause from error
            raise


@contextmanager
def joined(address: str, threads: int) -> Iterator[Cluster]:
    """Joins a Ray cluster, or the one that this process has joined already, and leaves it at the end.

    Args:
        address: ``"local"`` to start a cluster on this machine, else of a running one, such as ``"auto"``.
        threads: of torch, a task.

    Raises:
        OptionError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise OptionError("--ray needs Ray, which is not installed; pip install 'normkit[ray]'") from None
    begun = not ray.is_initialized()
    if begun:
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        local: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
        try:
            ray.init(**local, log_to_driver=False, runtime_env={"env_vars": variables})
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise OptionError(f"no Ray cluster at {address!r}: {error}") from error
    try:
        yield Cluster(ray, threads)
    finally:
        if begun:
            ray.shutdown()


def on_ray(
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
        OptionError: Ray is not installed, or there is no cluster at the address.
    """

    def end(count: int, result: dict[str, Any]) -> None:
        results[jobs[count].path] = result
        done(jobs[count].path)

    with joined(address, threads) as cluster:
        cluster.spread(_attend, [(function, job, places[job.path].absolute(), threads) for job in jobs], end)


def _attend(function: Function, job: Job, place: Path, threads: int) -> dict[str, Any]:
    while True:
        try:
            return attend(function, job, place, threads)
        except record.InUseError:
            time.sleep(record.PAUSE)
