"""The benchmark as a command: what it measures, what it prints again, and that it says which."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="the report needs the extra [lab]")

from normkit.cli import app
from normkit.lab import bench, record
from normkit.lab.bench import speed
from normkit.lab.bench.speed import Case


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Collects the cells that are measured, with times from nowhere."""
    cells: list[Case] = []

    def measure(case: Case, rounds: int, compiled: bool) -> dict[str, Any]:
        cells.append(case)
        row = {"method": case.method, "shape": list(case.shape), "dtype": "float32", "layout": case.layout}
        times = {"seconds": {"ours": 1e-3}, "ratio": {"eager": 2.0}, "roofline": {"ours": 0.5}, "error": {}}
        return {**row, **times, "direction": case.direction, "backend": "native"}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return cells


def test_what_is_printed_again_is_said(tmp_path: Path, measured: list[Case]) -> None:
    def run(methods: str, *more: str) -> str:
        words = ["bench", "--quick", "--methods", methods, "--output", str(tmp_path), *more]
        done = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "200"})
        assert done.exit_code == 0
        return done.output

    first = run("layer_norm")
    assert "printed again" not in first
    assert "forward against eager: 1 cell, mean" in first
    assert ", 1 thread, native kernels" in (tmp_path / "speed.md").read_text()
    found = record.read_json(tmp_path / "speed.json")
    record.write_json(tmp_path / "speed.json", {**found, "date": "2001-02-03"})
    count = len(measured)
    said = "of them measured 2001-02-03, printed again; --overwrite measures them again"
    assert f"{count} {said}" in run("layer_norm")
    assert len(measured) == count
    assert record.read_json(tmp_path / "speed.json")["date"] == "2001-02-03"
    assert f"{count} {said}" in run("layer_norm,rms_norm")
    assert record.read_json(tmp_path / "speed.json")["date"] == found["date"]
    # A few cells asked for again leave the others in the record.
    run("layer_norm")
    assert {row["method"] for row in record.read_json(tmp_path / "speed.json")["rows"]} == {"layer_norm", "rms_norm"}
    assert "rms_norm" not in (tmp_path / "speed.md").read_text()
    words = ["bench", "--quick", "--rounds", "2", "--methods", "rms_norm", "--output", str(tmp_path)]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "measured otherwise: rounds is 7 there, 2 now" in refused.output
    before = len(measured)
    assert "printed again" not in run("layer_norm", "--overwrite")
    assert len(measured) == before + count


def test_an_earlier_record_says_what_got_slower(tmp_path: Path, measured: list[Case]) -> None:
    def run(folder: str, *more: str) -> str:
        words = ["bench", "--quick", "--methods", "rms_norm", "--output", str(tmp_path / folder), *more]
        done = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "80"})
        assert done.exit_code == 0
        return done.output

    results = tmp_path / "RESULTS.md"
    said = run("first", "--results", str(results))
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line) <= 80
    assert said.count("rms_norm") >= 2  # in the table, and as the worst cell
    earlier = record.read_json(results.with_suffix(".json"))
    assert [row["case"] for row in earlier["rows"]] == list(map(str, measured))
    assert len(results.read_text().splitlines()) < 20  # the cells are in the record
    for row in earlier["rows"]:
        row["interval"] = {"eager": [2.1, 2.2] if row["direction"] == "forward" else [1.9, 2.1]}
    record.write_json(tmp_path / "earlier.json", earlier)
    said = " ".join(run("second", "--against", str(tmp_path / "earlier.json")).split())
    assert "2 ratios in both, 1 slower beyond noise, 0 faster" in said
    assert "forward: 2.00 of eager, was 2.00 (2.10 to 2.20)" in said


def test_the_error_of_a_layer_with_running_statistics_is_that_of_its_arithmetic() -> None:
    found = speed.measure(Case("batch_norm", (4, 8, 5, 5), torch.float32, False, "forward"), rounds=1, compiled=False)
    assert max(found["error"].values()) < 1e-6  # a few roundings of float32
