"""Work as tasks of a Ray cluster: each with its cores, and tried again from its checkpoint when its worker is lost."""

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from normkit.core.errors import BackendError, NormkitError, OptionError
from normkit.lab.data.root import VARIABLE

LOCAL = "local"
RETRIES = 5
PATIENCE = 5.0


class Cluster:
    """A Ray cluster: a task takes `threads` cores, and a GPU if there is one; one whose worker is lost goes to another."""

    def __init__(self, ray: Any, threads: int) -> None:
        self.ray = ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpu = [node for node in nodes if node.get("GPU")]
        self.needs = {"num_cpus": threads, "num_gpus": 1 if with_gpu else 0}
        # Ray would wait for a larger machine for ever.
        most = int(max((node.get("CPU", 0) for node in with_gpu or nodes), default=0))
        if threads > most:
            where = "machine with a GPU" if with_gpu else "machine"
            raise OptionError(
                f"threads is {threads}, which are a run's cores on Ray; no {where} of the cluster has more than {most}; "
                f"give --threads from 1 to {most}, or start Ray with more"
            )

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """Calls a function on a worker."""
        return self.spread(function, [given], [function.__name__])[0]

    def spread(
        self,
        function: Callable[..., Any],
        given: Sequence[tuple[Any, ...]],
        names: Sequence[str],
        done: Callable[[int, Any], object] = lambda *_: None,
    ) -> list[Any]:
        """Calls a module-level function for each of `given`; `done` hears of each that ends, by its place and result."""
        task = self.ray.remote(**self.needs, max_retries=RETRIES)(function)
        pending = {task.remote(*each): place for place, each in enumerate(given)}
        results: list[Any] = [None] * len(given)
        try:
            while pending:
                for reference in self.ray.wait(list(pending))[0]:
                    place = pending.pop(reference)
                    results[place] = self._result(reference, names[place])
                    done(place, results[place])
        except BaseException:
            for reference in pending:
                self.ray.cancel(reference, force=True)
            raise
        return results

    def _result(self, reference: Any, name: str) -> Any:
        faults = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except faults.RayTaskError as error:
            if isinstance(error.cause, NormkitError):
                raise error.cause from error
            raise
        except (faults.WorkerCrashedError, faults.NodeDiedError, faults.OutOfMemoryError) as error:
            raise BackendError(
                f"{name}: its worker was lost {RETRIES + 1} times ({type(error).__name__}); look whether memory runs out there, "
                "and run fewer at once by a larger --threads; the same command goes on from what is kept"
            ) from error


@contextmanager
def joined(address: str, threads: int) -> Iterator[Cluster]:
    """Joins a Ray cluster, or the one that this process has joined already, and leaves it at the end."""
    try:
        import ray
    except ModuleNotFoundError:
        raise OptionError("--ray needs Ray, which is not installed; pip install 'normkit[ray]'") from None
    begun = not ray.is_initialized()
    if begun:
        _knock(address)
        local: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
        try:
            ray.init(**local, log_to_driver=False, runtime_env={"env_vars": _variables()})
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise OptionError(f"no Ray cluster at {address!r}: {error}") from error
    try:
        yield Cluster(ray, threads)
    finally:
        if begun:
            ray.shutdown()


def _knock(address: str) -> None:
    # Ray would try for more than a minute, and tell so in its log alone.
    found = re.fullmatch(r"(?:ray://)?([^/]+):([^/:]*)", address)
    if found is None:
        return
    host, port = found[1].strip("[]"), found[2]
    if not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise OptionError(f"no Ray cluster at {address!r}: its port is {port!r}; wanted a number from 1 to 65535")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (OSError, UnicodeError) as error:
        raise OptionError(f"no Ray cluster at {address!r}: {error}") from error


def _variables() -> dict[str, str]:
    # A worker has another working folder, so that no path may be relative to this one.
    found = {}
    if root := os.environ.get(VARIABLE):
        found[VARIABLE] = os.path.abspath(root)
    if paths := os.environ.get("PYTHONPATH"):
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    return found
