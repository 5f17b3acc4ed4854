"""What would go wrong silently in placed, adopted and converted models is refused, or forgotten where it is stale."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normkit as nk
from normkit.core.errors import NormkitError
from normkit.surgery import adopt, drop_redundant_bias, freeze, place_norms, plain, translate


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def hinted() -> Any:
    model = encoder()
    place_norms(model, "hybrid")
    return model(torch.randn(1, 4, 8), is_causal=True)


def parametrized() -> Any:
    model = encoder()
    nn.utils.parametrizations.weight_norm(model.layers[0].linear1)
    return place_norms(model, "deep")


def packed() -> Any:
    model = nn.Sequential(nn.LSTM(4, 6, batch_first=True))
    nk.convert(model, "layer_norm_lstm")
    return model(nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 4), [5, 3], batch_first=True))


def batched() -> Any:
    return nk.condition(nn.Conv2d(4, 8, 1, groups=2), left=torch.ones(2, 4, 4), where="all")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (batched, r"left of a matrix of 2x4x2 is of 2x4x4; wanted 4, a diagonal, or 4x4; one tensor serves all groups"),
        (hinted, "give the mask"),
        (parametrized, "put those on afterwards"),
        (packed, "pad_packed_sequence"),
        (lambda: adopt(nn.Sequential(nn.BatchNorm1d(3)), "keras", momentum=5.0), "from 0 to 1"),
        (lambda: adopt(nn.Sequential(nn.LayerNorm(4)), "keras", eps=-1.0), "eps from 0"),
        (lambda: translate({"params/kernel": torch.ones(2, 2, 3)}, nn.Linear(6, 3), source="flax"), "flatten it"),
    ],
)
def test_what_would_go_wrong_is_refused(act: Callable[[], Any], said: str) -> None:
    with pytest.raises(NormkitError, match=said):
        act()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_waiting_moments_follow_a_move(dtype: torch.dtype) -> None:
    norm, x = nk.BatchNorm(2, accumulate=2, momentum=1.0), torch.randn(8, 2)
    norm(x[:4])
    norm.to(dtype)(x[4:].to(dtype))
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, x.mean(0).to(dtype))  # the first half was summed in float32
    norm(x[:4].to(dtype))
    norm.to("meta")(x[4:].to("meta", dtype))


@pytest.mark.parametrize("how", ["load", "accumulate"])
def test_waiting_moments_do_not_outlive_their_group(how: str) -> None:
    norm = nk.BatchNorm(2, accumulate=2, momentum=1.0)
    norm(torch.full((8, 2), 100.0) + torch.randn(8, 2))
    if how == "load":
        norm.load_state_dict(nk.BatchNorm(2).state_dict())
    else:
        norm.accumulate = 1
        norm(torch.randn(8, 2))
        norm.accumulate = 2
    norm(torch.randn(8, 2))
    norm(torch.randn(8, 2))
    assert norm.running_mean is not None
    assert norm.running_mean.abs().max() < 10


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def wrapped(tmp_path: Path) -> Iterator[nn.Module]:
    """A module that holds one wrapped for several processes, of which there is one."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.LayerNorm(5), nn.RMSNorm(5))
    with one_process(tmp_path):
        yield nn.Sequential(DistributedDataParallel(net))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nk.condition(model, where="all"),
        lambda model: nk.convert(model, "ln", source="rms"),
        lambda model: nk.convert(model, "none", source="bn"),
        lambda model: nk.apply_recipe(model, "keep+wn"),
        freeze,
        lambda model: drop_redundant_bias(model, torch.randn(2, 3, 4, 5)),
    ],
    ids=["condition", "created", "dropped", "recipe", "freeze", "bias"],
)
def test_other_parameters_in_a_wrapper_for_processes_are_refused(wrapped: Any, change: Callable[[Any], Any]) -> None:
    state = {key: (id(value), value.requires_grad) for key, value in wrapped.named_parameters()}
    kept = list(wrapped.modules())
    for model in (wrapped, wrapped[0]):
        with pytest.raises(NormkitError, match="before it is wrapped in DistributedDataParallel"):
            change(model)
        assert {key: (id(value), value.requires_grad) for key, value in wrapped.named_parameters()} == state
        assert all(a is b for a, b in zip(wrapped.modules(), kept, strict=True))


def test_a_wrapped_model_may_be_plain_for_a_time(tmp_path: Path) -> None:
    with one_process(tmp_path):
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nk.condition(nn.Linear(4, 2)).model)
        model = nn.Sequential(DistributedDataParallel(net))
        kept = list(model.parameters())
        with plain(model):
            assert "0.module.0.weight" in model.state_dict()
        assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))


def test_the_same_parameters_in_a_wrapper_for_processes_pass(wrapped: Any) -> None:
    x = torch.randn(2, 3, 4, 5)
    assert len(nk.convert(wrapped[0], "sync_bn", source="bn")) == 1
    nk.accelerate(wrapped)
    nk.recalibrate(wrapped, [x])
    freeze(wrapped, affine=False)
    wrapped(x).sum().backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())


@pytest.mark.parametrize("to", ["gn:gcd32", "in"])
def test_a_norm_of_one_value_is_refused(to: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1))
    model.append(nn.BatchNorm2d(8))
    norm, x = model[4], torch.randn(2, 3, 5, 5)
    with pytest.raises(NormkitError, match=r"^4: .* has one value for each statistic .* constant"):
        nk.convert(model, to, source="bn", example=x)
    changes = nk.convert(model, to, source="bn", example=x, on_refusal="leave")
    assert [row.layer for row in changes] == ["1"]
    assert [left.layer for left in changes.passed_over] == ["4"]
    assert model[4] is norm
    assert len(nk.convert(model, "rms:c", source="bn", example=x)) == 1
    assert len(nk.convert(model, "bn", example=x[:1])) == 2  # in training there may be more
