"""Cost: memory and time of a step, and the benchmark as a command."""

import ast
import copy
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lab_samples
import normkit as nk
from normkit.cli import app
from normkit.engine.library import why_not
from normkit.lab import bench, record
from normkit.lab.bench import speed
from normkit.lab.bench.speed import Case
from normkit.lab.data.split import Data, Split
from normkit.lab.memory import keep_memory, peak_bytes
from normkit.lab.protocol import make_data
from normkit.lab.settings import Settings
from normkit.lab.train.cost import Step, measure_costs, measure_steps
from normkit.lab.train.fabric import start_fabric

CPU = torch.device("cpu")


def test_peak_counts_what_lives_at_once() -> None:
    x = torch.zeros(1000)

    def chain() -> None:
        y = x + 1  # 4000 bytes
        y = y * 2  # 4000 beside it; then the first is gone
        y = y - 3  # so again two at once

    assert peak_bytes(chain, CPU) == 8000
    assert peak_bytes(lambda: x.add_(1), CPU) == 0
    assert peak_bytes(lambda: x.view(10, 100).t(), CPU) == 0


def test_peak_counts_saved_values_and_gradients() -> None:
    weight = nn.Parameter(torch.ones(1000))

    def step() -> None:
        (weight * weight).exp().sum().backward()

    # Two results saved for the backward pass are 8000 bytes; gradients come on top of them.
    assert 12000 <= peak_bytes(step, CPU) <= 24000
    assert weight.grad is not None


def test_every_recipe_is_measured_alike() -> None:
    settings = Settings(accelerator="cpu", batch_size=32)
    data = make_data(lab_samples.data, "data")
    models = {"narrow": lab_samples.model(), "same": lab_samples.model()}
    costs = measure_costs(models, settings, data, start_fabric(settings), budget=0.0)
    assert (list(costs), costs["narrow"]["ratio"]) == (["narrow", "same"], 1.0)
    assert costs["narrow"]["mb_per_step"] == costs["same"]["mb_per_step"] > 0
    for cost in costs.values():
        low, high = cost["ms_quartiles"]
        assert 0 < low <= cost["ms_per_step"] <= high
        assert cost["rounds"] == 6
    assert costs["narrow"]["ratio_interval"] is None
    assert costs["same"]["ratio_interval"] is not None


def test_steps_are_measured_with_memory_kept() -> None:
    keep_memory.cache_clear()
    measure_steps({"nothing": Step(lambda: None, nn.Identity())}, CPU, budget=0.0)
    assert keep_memory.cache_info().misses == 1


@pytest.mark.parametrize("recipe", ["none+ws@all", "none+wn", "none+e@all"])
def test_memory_of_effective_weights_is_that_of_a_step(recipe: str) -> None:
    settings = Settings(accelerator="cpu", batch_size=128, condition=False)
    split = Split(torch.zeros(128, dtype=torch.long), torch.randn(128, 64))
    bare = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    models = {"bare": bare, recipe: nk.apply_recipe(copy.deepcopy(bare), recipe).model}
    costs = measure_costs(models, settings, Data(split, split, split), start_fabric(settings), budget=0.0)
    added = 1e6 * (costs[recipe]["mb_per_step"] - costs["bare"]["mb_per_step"])
    assert round(added) >= sum(parameter.nbytes for parameter in bare.parameters())


@pytest.mark.skipif(why_not() is not None, reason=f"no native kernels: {why_not()}")
@pytest.mark.parametrize("layer", [nn.Identity(), nk.RMSNorm(64), nk.GroupNorm(4, 8), nk.BatchNorm(8)], ids=repr)
def test_memory_is_that_of_the_kernels(layer: nn.Module) -> None:
    x = torch.randn(16, 8, 64)
    gradient = torch.randn_like(x)

    def step() -> None:
        leaf = x.detach().requires_grad_()
        layer(leaf).backward(gradient)
        layer.zero_grad()

    step()
    # The output and the gradient of the input, and little things: statistics and the gradients of parameters.
    assert x.nbytes <= peak_bytes(step, CPU) <= 2.2 * x.nbytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_is_kept_from_step_to_step() -> None:
    script = """
import resource, torch
from normkit.lab.memory import keep_memory
assert keep_memory()
def step():
    held = [torch.ones(1 << 20) for _ in range(20)]
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, _, last = ast.literal_eval(found)
    assert last < first / 10


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Collects the cells that are measured, with times from nowhere."""
    pytest.importorskip("matplotlib", reason="the report needs the extra [lab]")
    cells: list[Case] = []

    def measure(case: Case, rounds: int, compiled: bool) -> dict[str, Any]:
        cells.append(case)
        row = {"method": case.method, "shape": list(case.shape), "dtype": "float32", "layout": case.layout}
        times = {"seconds": {"ours": 1e-3}, "ratio": {"eager": 2.0}, "roofline": {"ours": 0.5}, "error": {}}
        return {**row, **times, "direction": case.direction, "backend": "native"}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return cells


def benched(methods: str, folder: Path, *more: str, columns: str = "200") -> str:
    words = ["bench", "--quick", "--methods", methods, "--output", str(folder), *more]
    done = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": columns})
    assert done.exit_code == (2 if "--rounds" in more else 0)
    return done.output


def test_what_is_printed_again_is_said(tmp_path: Path, measured: list[Case]) -> None:
    def run(methods: str, *more: str) -> str:
        return benched(methods, tmp_path, *more)

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
    assert "measured otherwise: rounds is 7 there, 2 now" in run("rms_norm", "--rounds", "2")
    before = len(measured)
    assert "printed again" not in run("layer_norm", "--overwrite")
    assert len(measured) == before + count


def test_an_earlier_record_says_what_got_slower(tmp_path: Path, measured: list[Case]) -> None:
    results = tmp_path / "RESULTS.md"
    said = benched("rms_norm", tmp_path / "first", "--results", str(results), columns="80")
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line) <= 80
    assert said.count("rms_norm") >= 2  # in the table, and as the worst cell
    earlier = record.read_json(results.with_suffix(".json"))
    assert [row["case"] for row in earlier["rows"]] == list(map(str, measured))
    assert len(results.read_text().splitlines()) < 20  # the cells are in the record
    for row in earlier["rows"]:
        row["interval"] = {"eager": [2.1, 2.2] if row["direction"] == "forward" else [1.9, 2.1]}
    record.write_json(tmp_path / "earlier.json", earlier)
    said = " ".join(benched("rms_norm", tmp_path / "second", "--against", str(tmp_path / "earlier.json")).split())
    assert "2 ratios in both, 1 slower beyond noise, 0 faster" in said
    assert "forward: 2.00 of eager, was 2.00 (2.10 to 2.20)" in said


def test_the_error_of_a_layer_with_running_statistics_is_that_of_its_arithmetic() -> None:
    found = speed.measure(Case("batch_norm", (4, 8, 5, 5), torch.float32, False, "forward"), rounds=1, compiled=False)
    assert max(found["error"].values()) < 1e-6  # a few roundings of float32
