"""Jobs as tasks of a Ray cluster: each with its cores, and tried again from its checkpoint when its worker is lost."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from normkit.core.errors import NormkitError, OptionError
from normkit.lab import record
from normkit.lab.sweep import PAUSE, Function, Job, attend

LOCAL = "local"
RETRIES = 5
PASSED_ON = ("NORMKIT_DATA", "PYTHONPATH")


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

    A task takes `threads` cores, and a GPU where the cluster has some. A task whose worker process or machine is lost is
    given to another, which goes on from the checkpoint in the job's folder.

    Args:
        function: what to do.
        jobs: with what.
        places: the folder of each job, by its path.
        threads: of torch, a job.
        address: ``"local"`` to start a cluster on this machine, else of a running one, such as ``"auto"``.
        results: by path; filled.
        done: is told of every job done.

    Raises:
        OptionError: Ray is not installed, or there is no cluster at the address.
    """
    ray = _import_ray()
    begun = _join(ray, address)
    try:
        resources = {"num_cpus": threads, "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0}
        task = ray.remote(**resources, max_retries=RETRIES)(_task)
        pending = {task.remote(function, job, places[job.path].absolute(), threads): job.path for job in jobs}
        while pending:
            ready, _ = ray.wait(list(pending))
            for reference in ready:
                path = pending.pop(reference)
                results[path] = _result(ray, reference)
                done(path)
    finally:
        if begun:
            ray.shutdown()


def _task(function: Function, job: Job, place: Path, threads: int) -> dict[str, Any]:
    while True:
        try:
            return attend(function, job, place, threads)
        except record.InUseError:
            time.sleep(PAUSE)


def _result(ray: Any, reference: Any) -> dict[str, Any]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, NormkitError):
            raise error.cause from error
        raise


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise OptionError("--ray needs Ray, which is not installed; pip install 'normkit[ray]'") from None
    return ray


def _join(ray: Any, address: str) -> bool:
    if ray.is_initialized():
        return False
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    try:
        ray.init(
            address=None if address == LOCAL else address,
            log_to_driver=False,
            include_dashboard=False if address == LOCAL else None,
            runtime_env={"env_vars": variables},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise OptionError(f"no Ray cluster at {address!r}: {error}") from error
    return True
