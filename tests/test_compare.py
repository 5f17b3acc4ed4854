"""A comparison as a whole: what it records, and that a kill changes nothing of it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lab_samples
from lab_samples import SMALL
from normkit.core.errors import OptionError, ProtocolError, RecordError
from normkit.lab import record
from normkit.lab.comparison import compare, kept
from normkit.lab.experiments import reshow
from normkit.lab.progress import Watch, tell
from normkit.lab.say import Terminal
from normkit.lab.settings import Settings
from normkit.lab.study import Run
from normkit.lab.train.trainer import Trainer
from seam import forked

TESTS = Path(__file__).parent


def ran(folder: Path, settings: Settings = SMALL, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"model": lab_samples.model, "data": lab_samples.data, "report": False, **options}
    return compare(settings, folder, console=Console(quiet=True), **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    ran(folder)
    return folder


def lasting(result: dict[str, Any]) -> Any:
    """What of a result does not depend on the clock."""
    clock = {"seconds", "seconds_to_target", "cost", "full_hours"}
    if isinstance(result, dict):
        return {key: lasting(value) for key, value in result.items() if key not in clock}
    return [lasting(value) for value in result] if isinstance(result, list) else result


def found(folder: Path) -> dict[str, Any]:
    return record.read_json(folder / "result.json")["result"]


def test_result(whole: Path) -> None:
    kept_record = record.read_json(whole / "result.json")
    result = kept_record["result"]
    assert kept_record["experiment"]["name"] == "compare"
    assert result["baseline"] == "keep"
    task = {"kind": "classification", "score": "accuracy", "train": 128, "val": 32, "test": 80}
    assert result["task"] == {**task, "notes": ["no val split was given: 32 of 160 samples are drawn from train"]}
    assert kept_record["environment"]["torch"] == torch.__version__
    assert [len(recipe["sweep"]) for recipe in result["recipes"]] == [2, 2]
    for recipe in result["recipes"]:
        best = max(recipe["sweep"], key=lambda row: (row["val_score"], -row["val_loss"]))
        assert recipe["rate"] == best["rate"]
        assert [run["seed"] for run in recipe["runs"]] == [0, 1]
        tests = torch.tensor([run["test_score"] for run in recipe["runs"]])
        assert recipe["test_score"]["mean"] == pytest.approx(tests.mean().item())
        assert recipe["test_score"]["std"] == pytest.approx(tests.std().item())
        assert all(run["steps_to_target"] for run in recipe["runs"])
        assert len(recipe["condition"]["first"]["raw"]) == 3
        assert recipe["cost"]["mb_per_step"] > 0
    first, second = result["recipes"]
    assert first["changes"] == []
    assert len(second["changes"]) == 2
    expected = [b["test_score"] - a["test_score"] for a, b in zip(first["runs"], second["runs"], strict=True)]
    assert second["paired"]["differences"] == pytest.approx(expected)
    assert first["paired"]["differences"] == [0, 0]
    assert kept(whole) == f"kept in {whole}: 7 finished runs, and checkpoints of those begun"


def test_all_recipes_start_alike(whole: Path) -> None:
    configs = [record.read_json(path) for path in sorted(whole.glob("runs/*/*/*/config.json"))]
    for seed in (0, 1):
        origins = [config["origin"] for config in configs if config["seed"] == seed]
        assert len({(origin["init_sha256"], origin["order_sha256"], origin["data_sha256"]) for origin in origins}) == 1
    assert len({config["origin"]["init_sha256"] for config in configs}) == 2


def test_a_finished_comparison_is_read_back(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times() -> dict[Path, int]:
        files = (path for path in whole.rglob("*") if path.is_file() and path.name != "result.md")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    monkeypatch.setattr(Trainer, "train", lambda *given: pytest.fail("trained again"))
    result = ran(whole)
    assert result == record.read_json(whole / "result.json")
    assert times() == before


def test_a_users_words_are_printed_as_they_are(tmp_path: Path) -> None:
    folder, text = tmp_path / "d[/]2 c[red]6" / "a:cancer:b", StringIO()
    settings = replace(
        SMALL, recipes=("keep", "keep+e@re:[/04]"), seeds=(0,), rates=(0.1,), epochs=1, model="a:cancer:b"
    )
    given: dict[str, Any] = {"model": lab_samples.model, "data": lab_samples.data, "report": False}
    console = Console(file=text, width=500)
    for _ in range(2):  # a second time, it is read back
        compare(settings, folder, console=console, **given)
    reshow(folder, console)
    for words in (
        f": 2 recipes, 1 rate, 1 seed, 1 epoch per run; records in {folder}",
        f"{folder} holds this",
        f"result   {folder}",
        f"report   {folder}",
    ):
        assert words in text.getvalue()


def test_the_live_line_shows_patterns_as_they_are_and_is_not_cut() -> None:
    text = StringIO()
    run = Run("bn+e@re:[/04]:cancer:" + "stem|layer1|layer2|layer3", 0.0003, 2)
    with Watch(24, 0, print, Console(file=text, width=80, force_terminal=True)) as watch:
        watch.begin(run.label)
        tell(99, 100, 0.98765)
        assert watch.live
        watch.live.refresh()
    for word in ("run", "1/24", run.recipe, "rate", "0.0003", "seed", "2", "99/100", "0.988", "left"):
        assert word in text.getvalue()


def test_a_request_to_end_is_heard_like_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    def stopped() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray, in tests of this process, leaves its own behind
        with pytest.raises(KeyboardInterrupt):
            ran(tmp_path)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    monkeypatch.setattr(record, "write_checkpoint", write)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert forked(stopped) == 0  # in a process of its own, as tests may run in a thread, which hears no signals


def test_a_full_disk_behind_standard_output_is_told(tmp_path: Path) -> None:
    class Full(StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(RecordError, match=r"standard output: No space left on device; .*same command"):
        compare(SMALL, tmp_path, console=Terminal(file=Full()), model=lab_samples.model, data=lab_samples.data)
    assert ran(tmp_path)["result"]["recipes"]


def test_another_configuration_in_the_folder(whole: Path) -> None:
    with pytest.raises(RecordError, match=r"epochs is 3 there, 4 now; choose another --output, or --overwrite"):
        ran(whole, replace(SMALL, epochs=4))
    with pytest.raises(RecordError, match=r"model is .*model.* there, .*one_output"):
        ran(whole, model=lab_samples.one_output)


def test_a_folder_of_something_else_is_none_of_a_comparison(tmp_path: Path) -> None:
    config = {"experiment": "table1", "scale": "small", "epochs": None, "threads": 1, "seeds": [0]}
    for of, whose in ((config, "the experiment table1"), (SMALL.record("cpu"), "a comparison by an earlier normkit")):
        record.write_json(tmp_path / "config.json", of)
        record.write_json(tmp_path / "runs/keep/rate=0.1/seed=0/result.json", {})
        with pytest.raises(RecordError, match=f"holds records of {whose}, not of a comparison; choose another"):
            ran(tmp_path)
    record.write_json(tmp_path / "result.json", {"schema": 1, "title": "keep", "recipes": []})
    with pytest.raises(RecordError, match=r"a comparison by an earlier normkit; .*--overwrite"):
        reshow(tmp_path)


def names(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def kill_loop(folder: Path, seed: int, kills: int) -> int:
    words = [sys.executable, str(TESTS / "kill_loop.py"), str(folder), str(seed), str(kills)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unkilled") / "out"
    assert kill_loop(folder, 0, kills=0) == 0
    return folder


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_instant_it_ends_alike(tmp_path: Path, unkilled: Path, seed: int) -> None:
    killed = tmp_path / "killed"
    assert 3 <= kill_loop(killed, seed, kills=12) <= 12  # a lucky child may come to the end early
    files = names(unkilled)
    assert files == names(killed)
    exact = [name for name in files if name.match("seed=*/*") and not name.name.startswith("timing")]
    assert len(exact) == 6 * 5  # the lock among them
    for name in exact:
        assert (killed / name).read_bytes() == (unkilled / name).read_bytes()
    assert lasting(found(killed)) == lasting(found(unkilled))


class Interrupt(BaseException):
    """Stands for an interruption in the middle of a comparison."""


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    real, left = record.write_checkpoint, after

    def write(*given: Any) -> None:
        nonlocal left
        real(*given)
        left -= 1
        if not left:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_checkpoint", write)
        with pytest.raises(Interrupt):
            ran(folder)


def test_damaged_checkpoint_loses_nothing_else(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch, after=5)
    (path,) = tmp_path.glob("runs/*/*/*/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match=r"checkpoint\.pt is damaged.*only this run is trained again"):
        ran(tmp_path)
    for entry in path.parent.iterdir():
        entry.unlink()
    assert lasting(ran(tmp_path)["result"]) == lasting(found(whole))


@pytest.mark.parametrize("name", ["config.json", "environment.json", "runs/keep/rate=0.05/seed=0/result.json"])
def test_damaged_record_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    interrupted(tmp_path, monkeypatch, after=4)
    (tmp_path / name).write_text('{"status"')
    with pytest.raises(RecordError, match=f"{name} is damaged"):
        ran(tmp_path)


def test_changed_data_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch, after=4)
    changed = lab_samples.changed(test=lab_samples.data()["train"])
    changed.__module__, changed.__qualname__ = lab_samples.data.__module__, lab_samples.data.__qualname__
    with pytest.raises(RecordError, match="data_sha256 is "):
        ran(tmp_path, data=changed)


def test_full_disk_in_the_middle_is_resumed(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.fsync, 20

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(RecordError, match=r"No space left on device.*same command to go on"):
            ran(tmp_path)
    assert lasting(ran(tmp_path)["result"]) == lasting(found(whole))


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    once = replace(SMALL, recipes=("keep",), seeds=(0,), rates=(0.1,), epochs=1)
    ran(tmp_path, once)
    again = ran(tmp_path, replace(once, epochs=2), overwrite=True)
    assert again["config"]["epochs"] == 2
    assert not (tmp_path / "runs" / "keep" / "rate=0.05").exists()


def same_each_time() -> torch.nn.Module:
    torch.manual_seed(0)
    return lab_samples.model()


@pytest.mark.parametrize("model", [same_each_time, lab_samples.model])
def test_seeds_that_begin_with_the_same_weights_are_told(tmp_path: Path, model: Any) -> None:
    result = ran(tmp_path, replace(SMALL, recipes=("keep",), rates=(0.1,), epochs=1), model=model)["result"]
    told = any("every seed begins with the same weights" in note for note in result["task"]["notes"])
    assert told == (model is same_each_time)


def sizes_unknown() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.LazyLinear(8), torch.nn.LazyBatchNorm1d(), torch.nn.ReLU(), torch.nn.LazyLinear(3)
    )


def test_layers_that_learn_their_sizes_from_the_data(tmp_path: Path) -> None:
    settings = replace(SMALL, recipes=("bn", "ln"), seeds=(0,), rates=(0.1,), epochs=1)
    recipes = ran(tmp_path, settings, model=sizes_unknown)["result"]["recipes"]
    assert [row["runs"][0]["status"] for row in recipes] == ["ok", "ok"]
    assert recipes[1]["changes"]


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    result = ran(tmp_path, replace(SMALL, seeds=(0,), rates=(0.1,)))["result"]
    for recipe in result["recipes"]:
        assert recipe["paired"]["low"] is recipe["paired"]["high"] is None
        assert recipe["test_score"]["std"] is None
        assert recipe["rate_at_edge"] is False


@pytest.mark.parametrize("recipes", [("keep",), ("keep", "keep+wn")])
def test_when_everything_diverges(tmp_path: Path, recipes: tuple[str, ...]) -> None:
    settings = replace(SMALL, recipes=recipes, rates=(1e30, 2e30), schedule="constant")
    result = ran(tmp_path, settings, model=lab_samples.one_output, data=lab_samples.regression, report=True)["result"]
    assert result["target"]["score"] is None
    for recipe in result["recipes"]:
        assert {run["status"] for run in recipe["runs"]} == {"diverged"}
        assert recipe["paired"]["mean"] is recipe["test_score"]["mean"] is None
        assert recipe["condition"] is None
    assert (tmp_path / "report.html").stat().st_size > 0


def test_a_rate_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    settings = replace(SMALL, recipes=("keep",), rates=(0.01, 1e30))
    result = ran(tmp_path, settings, model=lab_samples.one_output, data=lab_samples.regression)["result"]
    (recipe,) = result["recipes"]
    assert [row["status"] for row in recipe["sweep"]] == ["ok", "diverged"]
    assert recipe["rate"] == 0.01
    assert result["task"]["score"] == "r2"


def test_two_processes_under_torchrun(tmp_path: Path) -> None:
    words = "--recipes keep,keep+e --seeds 1 --rates 0.1 --epochs 2 --batch-size 32 --no-report --accelerator cpu"
    factories = ["--model", "lab_samples:model", "--data", "lab_samples:data", "--output", str(tmp_path / "out")]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    run += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    path = os.pathsep.join(map(str, (TESTS.parent / "src", TESTS)))
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run += ["-m", "normkit.cli", "compare", *words.split(), *factories]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kept_record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert kept_record["config"]["device"] == "cpu x 2"
    assert [recipe["runs"][0]["status"] for recipe in kept_record["result"]["recipes"]] == ["ok", "ok"]
    assert done.stdout.count("best of") == 2


def test_processes_that_fabric_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="precision=3-bit"):
        ran(tmp_path, replace(SMALL, precision="3-bit"))


def test_bad_input_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="returned a str"):
        ran(tmp_path / "out", model=lab_samples.no_module)
    assert not (tmp_path / "out").exists()
