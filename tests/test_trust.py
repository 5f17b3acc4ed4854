"""Records that can be trusted: what is deleted is ours, what is finished is what it says, what is damaged is told."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lab_samples
from experiment_samples import EXPERIMENT
from interruption import Stop, at_call
from lab_samples import files
from normkit.core.errors import OptionError, RecordError
from normkit.lab import record
from normkit.lab.experiment import Bench
from normkit.lab.experiments import reshow
from normkit.lab.perform import perform
from normkit.lab.settings import Settings

SMALL = replace(lab_samples.SMALL, rates=(0.1,), epochs=2)
QUIET = Console(quiet=True)
compared = partial(lab_samples.compared, settings=SMALL)


def performed(folder: Path, **options: Any) -> dict[str, Any]:
    more = {key: options.pop(key) for key in ("overwrite", "report") if key in options}
    bench = Bench("small", folder, seeds=(0, 1), console=QUIET, **options)
    return perform(EXPERIMENT, bench, **{"report": False, **more})


def trained(folder: Path) -> set[Path]:
    return {path for path in folder.glob("runs/**/metrics.jsonl") if path.parent.name.startswith("seed=")}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "out"
    compared(folder)
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment") / "out"
    performed(folder, report=True)
    return folder


@pytest.fixture
def copied(comparison: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(comparison, tmp_path / "copy"))


BOTH = pytest.mark.parametrize("begin", [compared, performed], ids=["comparison", "experiment"])


@BOTH
@pytest.mark.parametrize("config", ['{"model_type": "bert"}', '{"model": "x", "seeds": [0]}', "[1]", "{"])
def test_a_strangers_folder_is_left_alone(tmp_path: Path, begin: Callable[..., Any], config: str) -> None:
    for name in ("runs/exp1/best.pt", "figures/mine.png", "result.json", "report.html", "tensorboard/mine/events.1"):
        record.write_bytes(tmp_path / name, b"years")
    record.write_bytes(tmp_path / "config.json", config.encode())
    before = files(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(RecordError, match=r"left alone|is damaged") as refused:
            begin(tmp_path, overwrite=overwrite)
        assert "--overwrite" not in str(refused.value)
    assert {name: kept for name, kept in files(tmp_path).items() if name != ".lock"} == before


ELSEWHERE = {
    "the experiment table1": {"experiment": "table1", "scale": "small", "epochs": None, "threads": 1, "seeds": [0]},
    "a comparison by an earlier normkit": SMALL.record("cpu"),
}


@BOTH
@pytest.mark.parametrize("whose", ELSEWHERE)
def test_records_of_something_else_are_refused(tmp_path: Path, begin: Callable[..., Any], whose: str) -> None:
    record.write_json(tmp_path / "config.json", ELSEWHERE[whose])
    for run in ("keep/rate=0.1/seed=0", "left/seed=0"):
        record.write_json(tmp_path / f"runs/{run}/result.json", {})
    with pytest.raises(RecordError, match=f"holds records of {whose}, not of .*; choose another"):
        begin(tmp_path)
    record.write_json(tmp_path / "result.json", {"schema": 1, "title": "keep", "recipes": []})
    with pytest.raises(RecordError, match=r"a comparison by an earlier normkit; .*--overwrite"):
        reshow(tmp_path)


@BOTH
def test_overwriting_spares_what_is_not_ours(tmp_path: Path, begin: Callable[..., Any]) -> None:
    begin(tmp_path, report=True)
    strange = dict.fromkeys(("runs/exp1/best.pt", "figures/mine.png", "notes/a.txt", "tensorboard/b"), b"years")
    for name, content in strange.items():
        record.write_bytes(tmp_path / name, content)
    ours = files(tmp_path).keys() - strange.keys()
    begin(tmp_path, overwrite=True)
    after = files(tmp_path)
    assert strange.items() <= after.items()
    assert after.keys() - strange.keys() == {name for name in ours if not name.startswith(("figures/", "report.html"))}


def test_a_finished_comparison_is_checked_against_its_data_and_model(copied: Path) -> None:
    with pytest.raises(RecordError, match=r"data_sha256 is .*--overwrite"):
        compared(copied, data=lab_samples.other_data)

    def other(classes: int = 3) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), lab_samples.model(classes))

    with pytest.raises(RecordError, match=r"init_sha256 is "):
        compared(copied, model=lab_samples.posing(other, lab_samples.model))
    before = record.read_json(copied / "result.json")["result"]["recipes"][0]["test_score"]
    assert compared(copied, data=lab_samples.other_data, overwrite=True)["result"]["recipes"][0]["test_score"] != before


def test_a_finished_comparison_whose_run_is_gone_gets_it_back(copied: Path, comparison: Path) -> None:
    gone = copied / "runs/keep+e/rate=0.1/seed=1"
    for name in ("config.json", "metrics.jsonl", "timing.jsonl", "result.json", None):
        shutil.rmtree(gone) if name is None else (gone / name).unlink()
        compared(copied)
        for path in ("metrics.jsonl", "result.json", "config.json"):
            assert (gone / path).read_bytes() == (comparison / gone.relative_to(copied) / path).read_bytes()


@pytest.mark.parametrize("operation", ["rename", "unlink", "replace"])
def test_overwriting_stopped_at_any_instant_leaves_no_old_run(comparison: Path, tmp_path: Path, operation: str) -> None:
    settings = replace(SMALL, seeds=(0,))
    once = lab_samples.other_data
    wanted = compared(tmp_path / "new", settings=settings, data=once)["result"]["recipes"]
    for count in (1, 2, 3, 5, 8, 12):
        folder = Path(shutil.copytree(comparison, tmp_path / f"{operation}{count}"))
        with suppress(Stop), at_call(os, operation, count):
            compared(folder, settings=settings, data=once, overwrite=True)
        again = compared(folder, settings=settings, data=once, overwrite=count % 2 == 0 or count == 1)
        found = again["result"]["recipes"]
        for one, other in zip(found, wanted, strict=True):
            assert one["test_score"] == other["test_score"]
        assert len(trained(folder)) == 2
        assert not [name for name in files(folder) if "discarded" in name or "overwrite" in name]


@BOTH
def test_overwriting_given_again_gets_on(tmp_path: Path, begin: Callable[..., Any]) -> None:
    begin(tmp_path)
    stops = 0
    while stops < 12:
        with suppress(Stop), at_call(record, "write_checkpoint", 3):
            begin(tmp_path, overwrite=True)
            break
        stops += 1
    assert 0 < stops < 12
    again = begin(tmp_path)
    assert again["finished"] == record.read_json(tmp_path / "result.json")["finished"]
    begin(tmp_path, overwrite=True)  # a finished record is begun from nothing
    assert record.read_json(tmp_path / "result.json") != again or again["seconds"] == 0


DAMAGE: dict[str, Any] = {
    "null": None, "text": "x", "NaN": float("nan"), "list": [], "dict": {}, "number": -7, "huge": 10**400, "escape": "\x1b[2J",
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, lists at their first entry alone."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    value = value.copy()
    value[path[0]] = replaced(value[path[0]], path[1:], by)
    return value


def told(work: Callable[[], Any], path: Path) -> bool:
    """Whether a record was refused; a damaged one may be refused in words or do no harm, and nothing else."""
    said = ""
    try:
        work()
    except (RecordError, OptionError) as error:
        said = str(error)
    assert not said or str(path.parent) in said, said
    return bool(said)


def damaged(path: Path) -> Iterator[str]:
    """Writes a file again and again, each time with another damage."""
    whole = path.read_text()
    try:
        rows = [json.loads(line) for line in whole.splitlines()] if path.suffix == ".jsonl" else json.loads(whole)
        for turn, place in enumerate(places(rows)):
            if path.suffix != ".jsonl" or place:
                # A third of the kinds at each place, others at the next: all are met, and often.
                for name, by in list(DAMAGE.items())[turn % 3 :: 3]:
                    made = replaced(rows, place, by)
                    lines = map(json.dumps, made) if path.suffix == ".jsonl" else [json.dumps(made)]
                    path.write_text("\n".join(lines) + "\n")
                    yield f"{path.name} {place} {name}"
        ruins = {"empty": "", "half": whole[: len(whole) // 2], "twice": whole + whole, "deep": "[" * 10**5}
        for name, text in ruins.items():
            path.write_text(text)
            yield f"{path.name} {name}"
    finally:
        path.write_text(whole)


RUN = "runs/keep+e/rate=0.1/seed=0"
OF_RUN = [f"{RUN}/{file}" for file in ("result.json", "metrics.jsonl", "timing.jsonl", "timing.json")]


@pytest.mark.parametrize("name", ["result.json", "runs/costs/*/result.json", *OF_RUN])
def test_a_damaged_comparison_is_told_or_does_no_harm(
    copied: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("normkit.lab.report.drawing.save", lambda *given: [])
    monkeypatch.setattr("normkit.lab.report.sheet.write_sheet", lambda *given: copied)
    console = Console(width=200, force_terminal=True, color_system=None)
    wanted = record.read_json(copied / "result.json")["result"]["recipes"]
    path, refused = next(copied.glob(name)), 0
    for what in damaged(path):
        if name.startswith("runs/"):
            # What was computed from the runs is made anew from them.
            kept = (copied / "result.json").read_bytes()
            (copied / "result.json").unlink()
            refused += told(lambda: compared(copied), path)
            if (copied / "result.json").exists() and not what.endswith("number"):  # which may be a score
                found = record.read_json(copied / "result.json")["result"]["recipes"]
                assert [row["test_score"] for row in found] == [row["test_score"] for row in wanted], what
            (copied / "result.json").write_bytes(kept)
        else:
            refused += told(lambda: reshow(copied, console), path)
    assert refused > 5
    assert "\x1b[2J" not in capsys.readouterr().out


def test_metrics_of_a_finished_run_are_all_there(copied: Path) -> None:
    path = copied / RUN / "metrics.jsonl"
    for text in ("", path.read_text().splitlines()[0] + "\n"):
        path.write_text(text)
        with pytest.raises(RecordError, match=r"seed=0 .*2 epochs.*only this run is trained again"):
            compared(copied)


def test_a_damaged_experiment_is_told_or_does_no_harm(experiment: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(experiment, tmp_path / "copy"))
    wanted = record.read_json(folder / "result.json")["result"]
    refused = 0
    for name in ("result.json", "runs/left/seed=0/result.json", "runs/left/seed=0/timing.json", "environment.json"):
        path = folder / name
        for what in damaged(path):
            if name != "result.json":
                (folder / "result.json").unlink(missing_ok=True)
            refused += told(lambda: performed(folder), path)
            if (folder / "result.json").exists() and name != "result.json":
                assert record.read_json(folder / "result.json")["result"] == wanted, what
    assert refused > 10


def test_a_later_schema_can_be_come_by(copied: Path) -> None:
    path = copied / "result.json"
    record.write_json(path, {**record.read_json(path), "schema": 2})
    with pytest.raises(RecordError, match=r"schema 2.*schema 1.*remove .*result\.json"):
        compared(copied)
    path.unlink()  # as it says
    assert compared(copied)["schema"] == 1


def test_a_folder_removed_meanwhile_is_no_dead_end(tmp_path: Path, comparison: Path) -> None:
    for begin in (compared, performed):
        gone = at_call(record, "write_checkpoint", 3, lambda: shutil.rmtree(tmp_path / "out"))
        with gone, pytest.raises(RecordError, match=r"was removed while .*same command"):
            begin(tmp_path / "out")
    found = compared(tmp_path / "out")
    rows = [each["result"]["recipes"] for each in (found, record.read_json(comparison / "result.json"))]
    for one, other in zip(*rows, strict=True):
        assert one["test_score"] == other["test_score"]


def test_links_are_not_followed_when_writing_or_deleting(tmp_path: Path, comparison: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "out"
    precious.write_text("years")
    folder.mkdir()
    (folder / "config.json.part").symlink_to(precious)
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(RecordError, match=r"cannot write"):
        compared(folder)
    (folder / ".lock").unlink()
    compared(folder)
    assert precious.read_text() == "years"
    elsewhere = Path(shutil.copytree(comparison / "runs", tmp_path / "elsewhere"))
    shutil.rmtree(folder / "runs")
    (folder / "runs").symlink_to(elsewhere)
    before = files(elsewhere)
    with pytest.raises(RecordError, match=r"runs is a symbolic link.*left alone"):
        compared(folder, overwrite=True)
    assert files(elsewhere) == before


@BOTH
def test_a_finished_folder_on_a_read_only_disk_is_read(
    tmp_path: Path, begin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = begin(tmp_path / "out", report=True)

    def refuse(*given: Any, **options: Any) -> Any:
        raise OSError(30, os.strerror(30))

    for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("normkit.lab.folder.locked", refuse)
    assert begin(tmp_path / "out", report=True) == result


@pytest.mark.parametrize("field", ["model", "data", "recipes"])
def test_letters_that_steer_a_terminal_are_refused(field: str) -> None:
    given: Any = ("keep\x1b[2J",) if field == "recipes" else "keep\x1b[2J"
    with pytest.raises(OptionError, match=rf"{field} is .*\\x1b.*printable"):
        Settings(**{field: given})
