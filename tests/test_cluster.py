"""Jobs on a Ray cluster of two workers, one of which is killed in the middle."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

ray = pytest.importorskip("ray", reason="Ray is an extra of its own")

import experiment_samples  # noqa: E402
from experiment_samples import Walk, doomed, fragile, walk  # noqa: E402
from normkit.core.errors import BackendError, OptionError, RecordError  # noqa: E402
from normkit.lab import record  # noqa: E402
from normkit.lab.cluster import Cluster  # noqa: E402
from normkit.lab.comparison import compare  # noqa: E402
from normkit.lab.devices import hardware  # noqa: E402
from normkit.lab.experiment import Bench  # noqa: E402
from normkit.lab.perform import perform  # noqa: E402
from normkit.lab.settings import Settings  # noqa: E402
from normkit.lab.sweep import sweep  # noqa: E402

# Ray and what it stands on leave sockets to the collector and use what Python has deprecated.
IGNORED = (f"ignore::{kind}Warning" for kind in ("Resource", "Deprecation", "Future"))
pytestmark = pytest.mark.filterwarnings(*IGNORED)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")])
    runtime = {"env_vars": {"PYTHONPATH": path}}
    quiet = {"include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, runtime_env=runtime, **quiet)
    yield
    ray.shutdown()


def records(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("runs/**/result.json")}


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    jobs = [Walk("left", seed, steps=6, rest=0.05) for seed in range(5)]
    (tmp_path / "alone/runs/left/seed=1").mkdir(parents=True)
    (tmp_path / "alone/runs/left/seed=1/died").touch()  # alone nobody dies
    alone = sweep(fragile, jobs, tmp_path / "alone", say=lambda text: None)
    said: list[str] = []
    assert sweep(fragile, jobs, tmp_path / "ray", ray="local", say=said.append) == alone
    assert records(tmp_path / "ray") == records(tmp_path / "alone")
    assert said[0].startswith("5 runs")
    assert sorted(line.split()[2] for line in said[1:]) == [job.path for job in jobs]
    victim = tmp_path / "ray/runs/left/seed=1"
    killed, *others = int((victim / "died").read_text()), *json.loads((victim / "pids").read_text())
    assert killed in others  # its steps were kept,
    assert len(others) == 2  # and another process went on with them
    pids = {pid for path in (tmp_path / "ray").glob("runs/**/pids") for pid in json.loads(path.read_text())}
    assert len(pids) > 1
    assert os.getpid() not in pids


def test_an_experiment_on_ray_is_the_same(tmp_path: Path) -> None:
    console = Console(quiet=True)
    alone = perform(experiment_samples.EXPERIMENT, Bench("small", tmp_path / "alone", console=console), report=False)
    spread = Bench("small", tmp_path / "ray", console=console, ray="local")
    found = perform(experiment_samples.EXPERIMENT, spread, report=False)
    assert found["result"] == alone["result"]
    assert found["environment"]["devices"] == [hardware()]
    assert records(tmp_path / "ray") == records(tmp_path / "alone")


def test_a_fault_on_a_worker_is_told_as_it_is(tmp_path: Path) -> None:
    sweep(walk, [Walk("left", 0)], tmp_path, say=lambda text: None)
    (tmp_path / "runs/left/seed=0/result.json").unlink()
    (tmp_path / "runs/left/seed=0/checkpoint.pt").write_bytes(b"broken")
    with pytest.raises(RecordError, match="is damaged"):
        sweep(walk, [Walk("left", 0)], tmp_path, ray="local", say=lambda text: None)


def test_a_worker_lost_again_and_again_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normkit.lab.cluster.RETRIES", 1)
    sweep(doomed, [Walk("left", 0)], tmp_path, ray="local", say=lambda text: None)
    before = records(tmp_path)
    with pytest.raises(BackendError, match=r"left/seed=1: its worker was lost 2 times .*larger --threads; the same"):
        sweep(doomed, [Walk("left", seed) for seed in (0, 1)], tmp_path, ray="local", say=lambda text: None)
    assert records(tmp_path) == before != {}


def test_more_threads_than_any_machine_has(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"threads is 3, .* no machine of the cluster has more than 2; give"):
        sweep(walk, [Walk("left", 0)], tmp_path, ray="local", threads=3, say=lambda text: None)


def test_a_gpu_and_its_cores_are_of_one_machine() -> None:
    def cluster(*nodes: tuple[bool, dict[str, float]]) -> SimpleNamespace:
        return SimpleNamespace(nodes=lambda: [{"Alive": alive, "Resources": has} for alive, has in nodes])

    head, worker = (True, {"CPU": 64.0}), (True, {"CPU": 8.0, "GPU": 4.0})
    assert Cluster(cluster(head), 64).needs == {"num_cpus": 64, "num_gpus": 0}
    assert Cluster(cluster(head, worker), 8).needs == {"num_cpus": 8, "num_gpus": 1}
    assert Cluster(cluster(head, (False, worker[1])), 64).needs == {"num_cpus": 64, "num_gpus": 0}
    with pytest.raises(OptionError, match="no machine with a GPU of the cluster has more than 8"):
        Cluster(cluster(head, worker), 9)


def test_workers_are_given_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        given.append(options["runtime_env"]["env_vars"])
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMKIT_DATA", "da:ta")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["src", "", "/there"]))
    with pytest.raises(OptionError, match="nobody there"):
        sweep(walk, [Walk("left", 0)], tmp_path, ray="auto", say=lambda text: None)
    paths = os.pathsep.join([str(tmp_path / "src"), str(tmp_path), "/there"])
    assert given == [{"NORMKIT_DATA": str(tmp_path / "da:ta"), "PYTHONPATH": paths}]


def test_no_cluster_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in (f"127.0.0.1:{server.getsockname()[1]}", f"ray://127.0.0.1:{server.getsockname()[1]}", "auto"):
            with pytest.raises(OptionError, match=f"no Ray cluster at '{address}': nobody there"):
                sweep(walk, [Walk("left", 0)], tmp_path, ray=address, say=lambda text: None)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("1.2.3.4:99999", "its port is '99999'; wanted a number from 1 to 65535"),
        ("1.2.3.4:0", "its port is '0'"),
        ("1.2.3.4:", "its port is ''"),
        ("ray://localhost:head", "its port is 'head'"),
        ("127.0.0.1:{closed}", "Connection refused"),
        ("ray://127.0.0.1:{closed}", "Connection refused"),
        ("a" * 70 + ".invalid:6379", ""),  # no name of a host
    ],
)
def test_an_address_where_nobody_listens_is_told_at_once(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    address = address.format(closed=closed)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked"))
    begun = time.monotonic()
    with pytest.raises(OptionError, match=f"no Ray cluster at '{address}': .*{message}"):
        sweep(walk, [Walk("left", 0)], tmp_path, ray=address, say=lambda text: None)
    assert time.monotonic() - begun < 10


def test_a_comparison_on_ray_has_the_same_records(tmp_path: Path) -> None:
    settings = Settings(
        model="lab_samples:model", data="lab_samples:data", recipes=("keep", "keep+e"), seeds=(0, 1),
        rates=(0.05, 0.2), epochs=2, batch_size=32, extend=False, accelerator="cpu",
    )  # fmt: skip
    options: dict[str, Any] = {"console": Console(quiet=True), "report": False, "threads": 1}
    compare(settings, tmp_path / "alone", **options)
    found = compare(settings, tmp_path / "ray", ray="local", **options)
    assert [recipe["cost"]["ms_per_step"] > 0 for recipe in found["result"]["recipes"]] == [True, True]
    names = {path.relative_to(tmp_path / "ray") for path in (tmp_path / "ray").glob("runs/*/*/*/*.json*")}
    assert len(names) == 5 * 6
    for name in names:
        if not name.name.startswith("timing"):
            assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    alone = record.read_json(tmp_path / "alone/result.json")["result"]
    for one, other in zip(found["result"]["recipes"], alone["recipes"], strict=True):
        for kept in ("rate", "sweep", "test_score", "paired", "condition"):
            assert one[kept] == other[kept]
        for key in ("test_score", "val_score", "steps_to_target"):
            assert [run[key] for run in one["runs"]] == [run[key] for run in other["runs"]]
    assert compare(settings, tmp_path / "ray", ray="local", **options) == found
