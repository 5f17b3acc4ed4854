"""A comparison as a whole: what it records, and that a kill changes nothing of it."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lab_samples
from interruption import Stop, at_call, forked
from lab_samples import SMALL, files
from lab_samples import compared as ran
from normkit.core.errors import RecordError
from normkit.lab import record
from normkit.lab.comparison import compare, kept
from normkit.lab.experiments import reshow
from normkit.lab.progress import Watch, tell
from normkit.lab.say import Terminal
from normkit.lab.study import Run
from processes import torchrun

TESTS = Path(__file__).parent


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


def result_of(folder: Path) -> dict[str, Any]:
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
    begun = f": 2 recipes, 1 rate, 1 seed, 1 epoch per run; records in {folder}"
    for words in (begun, f"{folder} holds this", f"result   {folder}", f"report   {folder}"):
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


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unkilled") / "out"
    ran(folder, LONGER)
    return folder


LONGER = replace(SMALL, recipes=("keep", "keep+e@first_last"), epochs=6)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_instant_it_ends_alike(tmp_path: Path, unkilled: Path, seed: int) -> None:
    draw, kills = random.Random(seed), 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def begun(operation: str, count: int, after: bool, seconds: float) -> None:
        """Dies beside a file operation or when a time is over, whichever comes first."""
        signal.setitimer(signal.ITIMER_REAL, seconds)  # whose signal ends the process
        with at_call(os, operation, count, die, after=after):
            ran(tmp_path, LONGER)

    for _ in range(12):
        drawn = draw.choice(("fsync", "replace")), draw.randint(1, 40), draw.random() < 0.5, draw.uniform(0.1, 0.8)
        kills += forked(lambda drawn=drawn: begun(*drawn)) < 0
    assert kills >= 3  # a lucky child may come to the end early
    ran(tmp_path, LONGER)
    found, wanted = files(tmp_path), files(unkilled)
    assert found.keys() == wanted.keys()
    exact = [name for name in found if "/seed=" in name and "/timing" not in name]
    assert len(exact) == 6 * 5  # the lock among them
    assert {name: found[name] for name in exact} == {name: wanted[name] for name in exact}
    assert lasting(result_of(tmp_path)) == lasting(result_of(unkilled))


def interrupted(folder: Path, after: int) -> None:
    with at_call(record, "write_checkpoint", after, after=True), pytest.raises(Stop):
        ran(folder)


def test_damaged_checkpoint_loses_nothing_else(tmp_path: Path, whole: Path) -> None:
    interrupted(tmp_path, after=5)
    (path,) = tmp_path.glob("runs/*/*/*/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match=r"checkpoint\.pt is damaged.*only this run is trained again"):
        ran(tmp_path)
    for entry in path.parent.iterdir():
        entry.unlink()
    assert lasting(ran(tmp_path)["result"]) == lasting(result_of(whole))


@pytest.mark.parametrize("name", ["config.json", "environment.json", "runs/keep/rate=0.05/seed=0/result.json"])
def test_damaged_record_is_named(tmp_path: Path, name: str) -> None:
    interrupted(tmp_path, after=4)
    (tmp_path / name).write_text('{"status"')
    with pytest.raises(RecordError, match=f"{name} is damaged"):
        ran(tmp_path)


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    interrupted(tmp_path, after=4)
    with pytest.raises(RecordError, match="data_sha256 is "):
        ran(tmp_path, data=lab_samples.other_data)


def same_each_time() -> torch.nn.Module:
    torch.manual_seed(0)
    return lab_samples.model()


@pytest.mark.parametrize("model", [same_each_time, lab_samples.model])
def test_seeds_that_begin_with_the_same_weights_are_told(tmp_path: Path, model: Any) -> None:
    result = ran(tmp_path, replace(SMALL, recipes=("keep",), rates=(0.1,), epochs=1), model=model)["result"]
    told = any("every seed begins with the same weights" in note for note in result["task"]["notes"])
    assert told == (model is same_each_time)


def sizes_unknown() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.LazyBatchNorm1d(), torch.nn.LazyLinear(3))


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


def test_two_processes_under_torchrun(tmp_path: Path) -> None:
    words = "--recipes keep,keep+e --seeds 1 --rates 0.1 --epochs 2 --batch-size 32 --no-report --accelerator cpu"
    factories = ["--model", "lab_samples:model", "--data", "lab_samples:data", "--output", str(tmp_path / "out")]
    out = torchrun("normkit.cli", "compare", *words.split(), *factories, folder=tmp_path)
    kept_record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert kept_record["config"]["device"] == "cpu x 2"
    assert [recipe["runs"][0]["status"] for recipe in kept_record["result"]["recipes"]] == ["ok", "ok"]
    assert out.count("best of") == 2
