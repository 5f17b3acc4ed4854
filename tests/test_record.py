"""Records: whole or absent, read with care, held by one process."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from normkit.core.errors import RecordError
from normkit.lab import folder, record
from normkit.lab.record import ANY, COUNT, NUMBER, each, fields, maybe, named, one_of, version


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b'{"a": 1', "damaged"),
        (b"[1]", "holds a list"),
        (b"{}", "a is not in it"),
        (b"\xff\xfe", "damaged"),
    ],
)
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


def test_missing_file_says_how_to_finish(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"result\.json is missing.*normkit compare"):
        record.read_json(tmp_path / "result.json")


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


KIND = fields(
    a=maybe(NUMBER), rows=each(fields(n=COUNT), least=1), who=one_of("me", "you"), more=named(each(NUMBER, count=2))
)
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
