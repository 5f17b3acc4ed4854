"""Records: whole or absent, read with care, held by one process, given back; and walks that a stop leaves no trace in."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lab_samples
from normkit.core.errors import OptionError, RecordError
from normkit.lab import folder, record
from normkit.lab.folder import CHECKPOINT, InUseError, locked
from normkit.lab.protocol import make_data, make_model
from normkit.lab.schema import ANY, COUNT, NUMBER, each, fields, maybe, named, one_of, version
from normkit.lab.seeding import borrowed_randomness, reseed
from normkit.lab.settings import Settings
from normkit.lab.sweep import sweep
from normkit.lab.train import walk as loops
from normkit.lab.train.fabric import start_fabric
from normkit.lab.train.trainer import Trainer
from normkit.lab.train.walk import DIVERGED, OK, Diverged, walk


def test_round_trips(tmp_path: Path) -> None:
    value = {"a": 0.1 + 0.2, "b": [1, None, "é", os.fsdecode(b"caf\xe9")]}  # the last is a folder named in Latin-1
    record.write_json(tmp_path / "deep" / "value.json", value)
    assert record.read_json(tmp_path / "deep" / "value.json", fields(a=NUMBER, b=each(ANY))) == value
    rows = [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": 1e-30}]
    record.write_lines(tmp_path / "rows.jsonl", rows)
    assert record.read_lines(tmp_path / "rows.jsonl", fields(epoch=COUNT), "epoch") == rows
    record.write_checkpoint(tmp_path / "c.pt", {"w": torch.arange(3.0), "n": 1})
    torch.testing.assert_close(record.read_checkpoint(tmp_path / "c.pt", ("n",))["w"], torch.arange(3.0))
    assert not list(tmp_path.rglob(f"*{record.TEMPORARY}"))


def test_infinity_is_refused_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        record.write_json(tmp_path / "value.json", {"a": float("inf")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "value.json"
    record.write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(RecordError, match=r"cannot write .*value\.json: No space left.*same command"):
        record.write_json(path, {"a": 2})
    monkeypatch.undo()
    assert record.read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_file_size_limit_of_the_system(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from normkit.core.errors import RecordError
from normkit.lab import record
path = Path(sys.argv[1])
record.write_json(path, {"a": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    record.write_json(path, {"a": "x" * 10000})
except RecordError as error:
    print(error)
"""
    run = [sys.executable, "-c", script, str(tmp_path / "value.json")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert record.read_json(tmp_path / "value.json") == {"a": 1}


DAMAGED = {b"": "damaged", b'{"a": 1': "damaged", b"[1]": "holds a list", b"{}": "a is not in it", b"\xff": "damaged"}


@pytest.mark.parametrize(("content", "words"), DAMAGED.items())
def test_damaged_json_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=words) as caught:
        record.read_json(path, fields(a=ANY))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def damage_a_weight(content: bytes) -> bytes:
    place = content.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"", damage_a_weight])
def test_damaged_checkpoint_is_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "runs" / "bn" / "rate=0.1" / "seed=0" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    record.write_checkpoint(path, {"w": torch.arange(1000.0)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecordError, match=r"checkpoint\.pt is damaged.*remove the folder .*seed=0"):
        record.read_checkpoint(path)
    assert path.exists()


def test_another_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    record.check_config(path, {"epochs": 3, "rates": (0.1,)}, "cure")
    record.check_config(path, {"epochs": 3, "rates": (0.1,)}, "cure")
    with pytest.raises(RecordError, match="epochs is 3 there, 4 now; cure"):
        record.check_config(path, {"epochs": 4, "rates": (0.1,)}, "cure")
    with pytest.raises(RecordError, match="rates is "):
        record.check_config(path, {"epochs": 3}, "cure")


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(RecordError, match=r"thesis\.tex but no config\.json"):
        folder.check_ours(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


MORE = named(each(NUMBER, count=2))
KIND = fields(a=maybe(NUMBER), rows=each(fields(n=COUNT), least=1), who=one_of("me", "you"), more=MORE)
GOOD = {"schema": 1, "a": None, "rows": [{"n": 0}], "who": "me", "more": {"b": [1, 2.5]}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"more": {}}, None),
        ({"a": True}, "a is true; wanted a finite number"),
        ({"a": "1"}, "a is '1'; wanted"),
        ({"rows": []}, "rows is a list of 0; wanted a list of 1 or more"),
        ({"rows": [{"n": 0}, {}]}, "rows.1.n is not in it"),
        ({"rows": [{"n": -1}]}, "rows.0.n is -1; wanted a whole number from 0"),
        ({"who": ["me"]}, "who is a list of 1; wanted me or you"),
        ({"more": {"\x1b": [0]}}, r"more.'\x1b' is a list of 1; wanted a list of 2"),
        ({"schema": 2, "a": "of then"}, "it is of schema 2, this normkit reads schema 1"),
        ({"schema": None}, "it is of schema null"),
    ],
)
def test_a_schema_says_where_and_what(change: dict[str, Any], said: str | None) -> None:
    found = version(1, KIND)({**GOOD, **change}, "")
    assert found is said is None or (said and found and found.startswith(said)), found


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}', '{"a": 1}{"a": 1}'])
def test_what_json_does_not_know_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "value.json").write_text(text)
    with pytest.raises(RecordError, match="damaged"):
        record.read_json(tmp_path / "value.json")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with folder.locked(tmp_path):
        with pytest.raises(RecordError, match="in use by another process"), folder.locked(tmp_path):
            pass
    with folder.locked(tmp_path):
        pass


def test_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file is a file, not a folder"), folder.locked(tmp_path / "file"):
        pass
    with pytest.raises(RecordError, match="cannot write"):
        record.write_json(tmp_path / "file" / "value.json", {})


def journey(folder: Path, stop: int | None = None, bad: int | None = None) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)

    def step(number: int) -> dict[str, float] | None:
        if number == stop:
            raise KeyboardInterrupt
        if number == bad:
            raise Diverged
        optimizer.zero_grad()
        loss = (model(torch.randn(4, 3)) ** 2).mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()} if number % 2 else None

    walked = walk(folder, 9, {"model": model, "optimizer": optimizer}, step, seed=3)
    return walked, model.weight[0].tolist()


def test_a_stop_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = journey(tmp_path / "whole")
    monkeypatch.setattr(loops, "PAUSE", 0.0)
    for stop in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            journey(tmp_path / "parts", stop)
    torch.manual_seed(99)
    assert journey(tmp_path / "parts") == whole
    assert whole[0].status == OK
    assert [row["step"] for row in whole[0].rows] == [1, 3, 5, 7, 9]


def test_a_finished_walk_is_not_walked_again(tmp_path: Path) -> None:
    whole = journey(tmp_path)
    assert journey(tmp_path, stop=1) == whole
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(KeyboardInterrupt):
        journey(tmp_path, stop=1)


def test_divergence_ends_a_walk(tmp_path: Path) -> None:
    walked, _ = journey(tmp_path, bad=5)
    assert (walked.status, walked.steps, len(walked.rows)) == (DIVERGED, 5, 2)


SETTINGS = Settings(epochs=2, batch_size=16, rates=(0.1,), accelerator="cpu", condition=False)


@dataclass(frozen=True)
class Job:
    path: str = "one"
    made_of: int = 1


def counted(job: Job, folder: Path) -> dict[str, Any]:
    record.write_checkpoint(folder / CHECKPOINT, {"step": 1})
    with open(folder / "done", "a") as file:
        file.write("x")
    return {}


def test_a_checkpoint_is_kept_until_the_result_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, write = tmp_path / "runs/one", record.write_json

    def killed(path: Path, value: Any, after: bool) -> None:
        if path.name == "result.json":
            write(path, value) if after else None
            raise KeyboardInterrupt
        write(path, value)

    for after in (False, True):
        monkeypatch.setattr(record, "write_json", lambda path, value, after=after: killed(path, value, after))
        with pytest.raises(KeyboardInterrupt):
            sweep(counted, [Job()], tmp_path, say=list)
        assert (place / CHECKPOINT).exists()
    monkeypatch.setattr(record, "write_json", write)
    sweep(counted, [Job()], tmp_path, say=list)
    assert not (place / CHECKPOINT).exists()
    assert (place / "done").read_text() == "xx"


def test_a_run_that_is_worked_on_is_not_replaced(tmp_path: Path) -> None:
    sweep(counted, [Job()], tmp_path, say=list)
    with locked(tmp_path / "runs/one"), pytest.raises(InUseError):
        sweep(counted, [Job(made_of=2)], tmp_path, say=list, replaces=True)
    assert (tmp_path / "runs/one/result.json").exists()
    sweep(counted, [Job(made_of=2)], tmp_path, say=list, replaces=True)


def test_fewer_samples_than_processes_are_refused(tmp_path: Path) -> None:
    data, fabric = make_data(lab_samples.data, "data"), SimpleNamespace(world_size=500)
    with pytest.raises(OptionError, match=r"128 training samples for 500 processes; wanted at least one each"):
        Trainer(0.1, 0, SETTINGS, lab_samples.model(), data, fabric, tmp_path)


def test_what_a_model_draws_does_not_change_the_samples(tmp_path: Path) -> None:
    drawn, seen = [], []

    def read(row: int) -> tuple[torch.Tensor, int]:
        drawn.append(torch.rand(()).item())
        return drawn[-1] + torch.arange(8.0) + row % 3, row % 3

    for dropout in (0.0, 0.5):
        data = make_data(lambda: lab_samples.Samples(80, read), "data")
        drawn.clear()
        reseed(0, "init")
        model = nn.Sequential(nn.Dropout(dropout), nn.Linear(8, 3))
        Trainer(0.1, 0, SETTINGS, model, data, start_fabric(SETTINGS), tmp_path / str(dropout)).train()
        seen.append([*drawn])
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > len(seen[0]) / 3  # each epoch draws its own; judging draws the same each time


def restless(made: Any) -> Any:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return made


def test_modes_that_user_code_sets_are_put_back() -> None:
    make_model(lambda: restless(lab_samples.model()), "model", 3)
    make_data(lambda: restless(lab_samples.data()), "data")
    with borrowed_randomness():
        restless(None)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
