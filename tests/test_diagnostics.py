"""Conditions of every weight, the signal through the depth, and the gap between training and evaluation."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import normkit as nk
from foreign_norms import wired
from normkit.cli import app
from normkit.core.errors import OptionError, SurgeryError
from normkit.diagnostics import activations, condition_number, conditions, gap
from normkit.diagnostics.activations import Stream
from normkit.diagnostics.conditioning import spectrum
from normkit.lab.report.weights import depth_figure
from normkit.weights.weight_conditioning import equilibrate, weight_conditioning


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (40, 6), (1, 4)], ids=str)
def test_every_way_finds_the_same_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    a = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, 3, shape[1])
    values = torch.linalg.svdvals(a)
    exact, found = spectrum(a), spectrum(a, exact=0)
    assert_close(exact.values, values, rtol=1e-12, atol=0)
    # Lanczos stops at 1e-9 of an eigenvalue, a square.
    assert_close((found.largest, found.smallest), (values[0].item(), values[-1].item()), rtol=1e-9, atol=0)
    assert found.values is None
    assert found.error < 1e-8
    assert math.isclose(exact.condition, condition_number(a), rel_tol=1e-12)


def test_matrices_without_full_rank_and_without_numbers() -> None:
    a = torch.randn(6, 4) @ torch.diag(torch.tensor([1.0, 2.0, 0.0, 1.0]))
    assert spectrum(a).condition == spectrum(a, exact=0).condition == spectrum(torch.zeros(2, 3)).condition == math.inf
    assert math.isnan(spectrum(torch.tensor([[math.nan, 1.0]])).condition)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv = nn.Linear(8, 24)
        self.last = weight_conditioning(nn.Linear(8, 3), "col")


def test_every_weight_is_reported_before_and_after() -> None:
    model = Net()
    state = copy.deepcopy(model.state_dict())
    told: list[str] = []
    found = {row.name: row for row in conditions(model, progress=lambda done, total, name: told.append(name))}
    packed = [f"{name}[{part}]" for name in ("mix.in_proj_weight", "qkv") for part in ("query", "key", "value")]
    assert list(found) == ["words", *packed[:3], "mix.out_proj", *packed[3:], "last"]
    assert told == ["words", "mix.in_proj_weight", "mix.out_proj", "qkv", "last"]
    keys = model.qkv.weight.detach().double()[8:16]
    row = found["qkv[key]"]
    assert (row.kind, row.shape) == ("key", (8, 8))
    assert_close(row.condition, condition_number(keys))
    assert_close(row.after["row"], condition_number(equilibrate(keys)))
    # Columns of a layer are scaled as a whole, as conditioning it would do.
    assert_close(row.after["col"], condition_number(equilibrate(model.qkv.weight.detach().double(), "col")[8:16]))
    assert_close(row.rows, (keys.norm(dim=1).max() / keys.norm(dim=1).min()).item())
    assert_close(row.columns, (keys.norm(dim=0).max() / keys.norm(dim=0).min()).item())
    assert_close(row.stable_rank, (keys.norm() / torch.linalg.matrix_norm(keys, 2)).square().item())
    last = found["last"]
    assert last.kind == "Linear"
    assert_close(last.raw, condition_number(model.last.parametrizations.weight.original))
    assert_close(last.condition, condition_number(model.last.weight))
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    read = json.loads(json.dumps([row.json() for row in found.values()], allow_nan=False))
    assert (read[0]["condition"], len(read[0]["spectrum"])) == (found["words"].condition, 8)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 99))
def test_moments_of_a_stream_are_those_of_the_whole(sizes: list[int], seed: int) -> None:
    x = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp() + 1000
    stream = Stream()
    for part in x.split(sizes):
        stream.add(part)
    apart = x - x.mean()
    assert stream.count == len(x)
    assert_close(stream.mean, x.mean().item(), rtol=1e-12, atol=0)
    assert_close(stream.std, apart.square().mean().sqrt().item(), rtol=1e-8, atol=1e-10)
    if len(x) > 1:
        # A mean of 1000 leaves 13 digits of each difference, 1e-9 of its fourth power where differences are small.
        wanted = (apart**4).mean() / apart.square().mean() ** 2
        assert_close(stream.kurtosis, wanted.item(), rtol=1e-6, atol=0)


def test_the_signal_of_every_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nk.BatchNorm(4), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 5), nn.Tanh())
    model[1].bias.data[1] = -99.0
    model[4].weight.data *= 50
    batches = [(torch.randn(6, 2, 2, 2), torch.randn(6, 5)) for _ in range(2)]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = activations(model, batches, F.mse_loss)
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [row.name for row in found] == list("012345")
    y = torch.cat([model[:6](x) for x, _ in batches])
    tanh = found[5]
    assert_close((tanh.mean, tanh.std), (y.mean().item(), y.std(correction=0).item()), rtol=1e-5, atol=1e-6)
    assert_close(tanh.saturated, (y.abs() > 0.98).float().mean().item(), rtol=1e-6, atol=0)
    assert (tanh.saturated or 0) > 0.5
    assert (found[2].dead, found[2].saturated) == (0.25, 0)
    assert found[0].saturated is None
    assert (found[5].gradient_std or 0) > 0
    assert activations(model, [x for x, _ in batches])[0].gradient_std is None
    with pytest.raises(OptionError, match="no batches"):
        activations(model, [])


def test_the_gradient_is_that_of_the_output() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), torch.randn(5, 3)
    (row, _) = activations(model, [(x, torch.zeros(5, 1))], lambda y, _: y.sum())
    assert_close(row.gradient_std, model[1].weight.detach().std(correction=0).item())


def twice(reentrant: bool = False) -> nn.Module:
    """A checkpointed layer, a conditioned one, and attention, whose projection is not called by itself."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=reentrant)
        return self.last(self.mix(x, x, x)[0])

    parts = {"body": nn.Linear(4, 4), "last": weight_conditioning(nn.Linear(4, 3)), "mix": nn.MultiheadAttention(4, 2)}
    return wired(forward, **parts)


def test_every_call_counts_once() -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    compiled = torch.compile(twice(), backend="eager")
    compiled(x)  # compiled code calls no hooks
    for model in (twice(), compiled):
        found = {row.name.removeprefix("_orig_mod."): row for row in activations(model, [(x, y)], F.cross_entropy)}
        assert {name: row.elements for name, row in found.items()} == {"body": 24, "mix": 24, "last": 18}
        assert all(row.gradient_std for row in found.values())
    with pytest.raises(OptionError, match="use_reentrant=False"):
        activations(twice(True), [(x, y)], F.cross_entropy)


def shifted() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    norms = nk.BatchNorm(6), nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(4, 6), norms[0], nn.ReLU(), nn.Linear(6, 6), norms[1], nn.Linear(6, 3))
    batches = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(3)]
    nk.recalibrate(model, batches)
    model[1].running_mean += 2.0
    return model.eval(), batches


def test_a_layer_whose_statistics_are_off_is_found_and_its_cost() -> None:
    model, batches = shifted()
    state = copy.deepcopy(model.state_dict())
    found = gap(model, batches, F.cross_entropy)
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [row.name for row in found] == ["1", "4"]
    deviation = (model[1].running_var + model[1].eps).sqrt()
    assert_close(found[0].distance, (2 / deviation).square().mean().sqrt().item(), rtol=1e-5, atol=0)
    assert found[1].distance < 1e-5

    def score() -> tuple[float, float]:
        outputs = [(model(x), y) for x, y in batches]
        losses = sum(F.cross_entropy(output, y).item() for output, y in outputs) / 3
        return losses, sum(int((output.argmax(1) == y).sum()) for output, y in outputs) / 96

    before = score()
    assert_close((found.loss, found.accuracy), before, rtol=1e-6, atol=0)
    other = model[4].running_mean.clone()
    assert found.recalibrate(beyond=0.1) == ["1"]
    assert torch.equal(model[4].running_mean, other)
    after = score()
    assert_close((found[0].loss, found[0].accuracy), (before[0] - after[0], after[1] - before[1]), rtol=1e-4, atol=1e-6)
    assert gap(model, iter(batches))[0].distance < 1e-5
    assert str(found).startswith("1: ")


def test_gaps_that_can_not_be_measured() -> None:
    model, batches = shifted()
    with pytest.raises(OptionError, match="walked several times"):
        gap(model, iter(batches), F.cross_entropy)
    with pytest.raises(SurgeryError, match="no batch normalization"):
        gap(nn.Linear(2, 2), batches)
    for batch, got in ((batches[0][0], "a Tensor"), ({"input": batches[0][0]}, "a dict of input")):
        for measure in (gap, activations):
            with pytest.raises(OptionError, match=f"{measure.__name__}: a loss needs .* got {got}"):
                measure(model, [batch], F.cross_entropy)
    model[1] = torch.compile(model[1], backend="eager")
    assert gap(model, batches)[0].name == "1"


MINE = """
from torch import nn
def conv(classes=10): return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, classes))
def head(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
def wide(): return nn.Linear(1100, 1030)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("conv --data digits --output out", "conditions.png"),
        ("conv --json", '"kind": "Conv2d"'),
        ("wide", "Lanczos"),
        ("head --data digits", "10x64"),
        ("head", "--data digits"),
    ],
)
def test_the_command(words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "measured.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["conditions", *f"measured:{words}".split()])
    assert done.exit_code == (2 if words == "head" else 0), done.output
    assert said in done.output
    if "--output" in words:
        (row, _) = json.loads((tmp_path / "out/conditions.json").read_text())
        assert row["operator"][0] > row["operator"][1] > 0


def test_the_figure_of_depth() -> None:
    figure = depth_figure({"mine": activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [torch.randn(4, 2)])})
    assert [len(axis.get_lines()) for axis in figure.axes] == [1, 1]
