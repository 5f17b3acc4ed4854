"""Cost of a step: memory against what is known by hand, and the shape of what is measured."""

import ast
import copy
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import lab_samples
import normkit as nk
from normkit.engine.library import why_not
from normkit.lab.data.split import Data, Split
from normkit.lab.memory import keep_memory, peak_bytes
from normkit.lab.protocol import make_data
from normkit.lab.settings import Settings
from normkit.lab.train.cost import Step, measure_costs, measure_steps
from normkit.lab.train.parallel import start_fabric

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
    assert list(costs) == ["narrow", "same"]
    assert costs["narrow"]["ratio"] == 1.0
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
