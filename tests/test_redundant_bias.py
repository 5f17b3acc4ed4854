"""Biases that the norm behind them cancels are dropped, and no others."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import normkit as nk
from foreign_norms import random_, wired
from normkit import BatchRenorm, GhostBatchNorm
from normkit.core.errors import SurgeryError
from normkit.surgery import drop_redundant_bias


def _trained(model: nn.Module, *shape: int) -> nn.Module:
    random_(model)
    for _ in range(3):
        model(torch.randn(*shape))
    return model.double()


def _held(model: nn.Module, x: Tensor) -> list[str]:
    """Dropping changes neither mode; returns the notes."""
    like = copy.deepcopy(model)
    flags = [module.training for module in model.modules()]
    state = {key: value for key, value in like.state_dict().items() if not key.endswith(("bias", "running_mean"))}
    changes = drop_redundant_bias(model, x)
    assert flags == [module.training for module in model.modules()]
    for key, value in state.items():
        assert_close(model.state_dict()[key], value, rtol=0, atol=0)
    for training in (False, True, False):
        assert_close(model.train(training)(x), like.train(training)(x), rtol=1e-9, atol=1e-9)
    kept = [{k: v for k, v in each.state_dict().items() if "running_var" in k} for each in (model, like)]
    assert_close(*kept)
    return [f"{row.layer} {row.after}: {row.note}" for row in changes] + [str(left) for left in changes.passed_over]


CANCEL = {
    "batch": lambda: nn.BatchNorm2d(6),
    "batch of ours": lambda: nk.BatchNorm(6),
    "ghost batch": lambda: GhostBatchNorm(6, 2),
    "batch renorm": lambda: BatchRenorm(6),
    "instance": lambda: nn.InstanceNorm2d(6),
    "instance tracked": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "one channel a group": lambda: nn.GroupNorm(6, 6),
    "batch without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
}


@pytest.mark.parametrize("norm", CANCEL)
def test_norms_that_subtract_each_channels_mean_cancel(norm: str) -> None:
    model = _trained(nn.Sequential(nn.Conv2d(3, 6, 3), CANCEL[norm](), nn.ReLU(), nn.Conv2d(6, 2, 1)), 4, 3, 6, 6)
    notes = _held(model, torch.randn(4, 3, 6, 6, dtype=torch.float64))
    assert len(notes) == 1
    assert notes[0].startswith("0 no bias")
    assert model[0].bias is None
    assert model[3].bias is not None


KEEP = {
    "group": lambda: nn.GroupNorm(3, 6),
    "layer": lambda: nn.GroupNorm(1, 6),
    "layer over channels": lambda: nk.LayerNorm(6, over="c"),
    "rms": lambda: nk.RMSNorm(6, over="c"),
}


@pytest.mark.parametrize("norm", KEEP)
@pytest.mark.parametrize("zero", [False, True])
def test_norms_of_several_channels_keep_it_even_where_it_is_zero_or_silent(norm: str, zero: bool) -> None:
    model = _trained(nn.Sequential(nn.Conv2d(3, 6, 3), KEEP[norm]()), 4, 3, 6, 6)
    if zero:  # nothing shows in the output: neither the bias nor anything before the norm
        nn.init.zeros_(model[0].bias)
        nn.init.zeros_(model[1].weight)
    notes = _held(model, torch.randn(4, 3, 6, 6, dtype=torch.float64))
    assert "does not cancel it" in notes[0]
    assert model[0].bias is not None


def test_linear_and_transposed_layers() -> None:
    model = _trained(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), 8, 5)
    assert _held(model, torch.randn(8, 5, dtype=torch.float64)) == ["0 no bias: BatchNorm1d(6) cancels it"]
    model = _trained(nn.Sequential(nn.ConvTranspose1d(5, 6, 3), nn.BatchNorm1d(6)), 8, 5, 4)
    assert "no bias" in _held(model, torch.randn(8, 5, 4, dtype=torch.float64))[0]


def test_channels_that_are_not_the_norms_keep_it() -> None:
    model = _trained(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), 8, 6, 5)  # tokens take the place of channels
    assert "does not cancel" in _held(model, torch.randn(8, 6, 5, dtype=torch.float64))[0]


def test_post_activation_keeps_it() -> None:
    model = _trained(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), 4, 3, 6, 6)
    assert _held(model, torch.randn(4, 3, 6, 6, dtype=torch.float64)) == []
    assert model[0].bias is not None


def test_an_output_that_is_read_elsewhere_keeps_it() -> None:
    parts = {"conv": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3)}
    model = _trained(wired(lambda self, x: self.norm(z := self.conv(x)) + z, **parts), 4, 3, 5, 5)
    assert _held(model, torch.randn(4, 3, 5, 5, dtype=torch.float64)) == []
    assert model.conv.bias is not None


def test_tied_parametrized_and_hooked_layers_keep_it() -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    tied = nn.Sequential(block(), block())
    tied[1][0].bias = tied[0][0].bias
    hooked, parametrized = block(), block()
    hooked[0].register_forward_hook(lambda layer, args, output: None)
    parametrize.register_parametrization(parametrized[0], "bias", nn.Identity())
    assert _held(_trained(tied, 4, 3, 5, 5), x) == []
    assert tied[0][0].bias is not None
    parts = {"conv": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3), "unused": nn.Conv2d(3, 3, 1)}
    resting = wired(lambda self, x: self.norm(self.conv(x)), **parts)
    resting.unused.bias = resting.conv.bias
    for model, why in ((resting, "tied"), (hooked, "hooks"), (parametrized, "parametrized")):
        notes = _held(_trained(model, 4, 3, 5, 5), x)
        assert notes
        assert all(why in note for note in notes), notes


def test_dropout_before_it_draws_the_same() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    state = torch.random.get_rng_state()
    assert len(drop_redundant_bias(model, torch.randn(4, 3, 6, 6))) == 1
    assert model[1].bias is None
    torch.random.set_rng_state(state)


def test_a_model_that_does_not_run_is_refused_and_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    with pytest.raises(SurgeryError, match="does not run on the example in training"):
        drop_redundant_bias(model, torch.randn(4, 2, 6, 6))
    assert not model.training
    assert model[0].bias is not None
