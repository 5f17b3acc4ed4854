"""Precise batch normalization: exact on full data, whatever the batches; nothing else is touched."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.activations.batch_norm import MeanOnlyBatchNorm
from normkit.activations.batch_renorm import BatchRenorm
from normkit.activations.ghost_batch_norm import GhostBatchNorm
from normkit.core.errors import OptionError, SurgeryError
from normkit.surgery.recalibrate import recalibrate


def _data() -> Tensor:
    return torch.cumsum(torch.randn(23, 3, 4, dtype=torch.float64), 0)  # batches differ much


@pytest.mark.parametrize(
    "make", [nn.BatchNorm1d, nk.BatchNorm, GhostBatchNorm, BatchGroupNorm, BatchRenorm, MeanOnlyBatchNorm]
)
@pytest.mark.parametrize("sizes", [[23], [10, 10, 3], [1, 22], [2] * 11 + [1]])
def test_exact_on_full_data_after_a_linear_layer(make, sizes: list[int]) -> None:
    model, x = nn.Sequential(nn.Conv1d(3, 5, 1), make(5)).double(), _data()
    changes = recalibrate(model, x.split(sizes))
    z = model[0](x).detach()
    assert_close(model[1].running_mean, z.mean((0, 2)))
    var = z.var((0, 2), correction=0)
    if make is BatchRenorm:
        assert_close(model[1].running_std, (var + 1e-5).sqrt())
    elif make is not MeanOnlyBatchNorm:
        assert_close(model[1].running_var, var)
    assert changes.rows[0].layer == "1"
    assert f"of {'1 batch' if len(sizes) == 1 else f'{len(sizes)} batches'}, 92 elements" in changes.rows[0].note


@pytest.mark.parametrize(
    "norm", [nk.SwitchableNorm(3), nk.ExemplarNorm(4), nk.ConditionalNorm(3, classes=2, over="n *")], ids=repr
)
def test_layers_with_a_batch_among_other_things_are_estimated_too(norm: nn.Module) -> None:
    channels = norm.running_mean.numel()
    x = torch.cumsum(torch.randn(23, channels, 4, dtype=torch.float64), 0)
    more = (torch.arange(23) % 2,) if isinstance(norm, nk.ConditionalNorm) else ()
    parts = zip(x.split(10), *(part.split(10) for part in more), strict=True)
    changes = recalibrate(norm.double(), parts, forward=lambda model, batch: model(*batch))
    assert len(changes) == 1
    assert_close(norm.running_mean, x.mean((0, 2)))
    assert_close(norm.running_var, x.var((0, 2), correction=0))


def test_a_map_of_conditions_is_no_mask() -> None:
    norm, x = nk.SpatiallyAdaptiveNorm(3, 2, over="n *").double(), _data()
    labels = torch.randn(23, 2, 4, dtype=torch.float64)
    recalibrate(norm, [0], forward=lambda model, _: model(x, labels))
    assert_close(norm.running_var, x.var((0, 2), correction=0))


def test_sequences_count_their_real_steps() -> None:
    norm, x = nk.RecurrentBatchNorm(3, batch_first=True).double(), _data().transpose(1, 2)
    lengths = torch.arange(23) % 4 + 1
    recalibrate(norm, [0], forward=lambda model, _: model(x, lengths=lengths))
    real = x[torch.arange(4) < lengths.unsqueeze(1)]
    assert_close(norm.running_mean, real.mean(0))
    assert_close(norm.running_var, real.var(0, correction=0))


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm1d(3, track_running_stats=True), nk.RecurrentBatchNorm(4, "frame", 5)], ids=repr
)
def test_other_running_statistics_are_left_and_told(norm: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), norm).double()
    before = copy.deepcopy(norm.state_dict())
    changes = recalibrate(model, [_data()])
    assert [row.layer for row in changes] == ["0"]
    assert [left.layer for left in changes.passed_over] == ["1"]
    assert_close(norm.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(SurgeryError, match=r"\(model\): it"):
        recalibrate(norm, [_data()])


def test_evaluation_after_it_is_training_on_the_full_data() -> None:
    model, x = nn.Sequential(nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5)).double(), _data()
    recalibrate(model, x.split(4))
    wanted = copy.deepcopy(model)(x)
    assert_close(model.eval()(x), wanted)


def test_deep_layers_see_inputs_normalized_by_their_batch() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)).double()
    x = _data()
    parts = [nn.BatchNorm1d(3).double()(part).relu() for part in x.split(6)]
    recalibrate(model, x.split(6))
    assert_close(model[2].running_mean, torch.cat(parts).mean((0, 2)).detach())


def test_plain_averages_of_batches() -> None:
    norm, x = nn.BatchNorm1d(3).double(), _data()
    parts = x.split(6)
    recalibrate(norm, parts, estimator="mean")
    assert_close(norm.running_mean, torch.stack([part.mean((0, 2)) for part in parts]).mean(0))
    assert_close(norm.running_var, torch.stack([part.var((0, 2)) for part in parts]).mean(0))


def test_a_shared_layer_sees_all_its_inputs() -> None:
    shared = nn.BatchNorm1d(3, affine=False)
    model, x = nn.Sequential(shared, nn.Sequential(nn.Linear(4, 4), shared)).double(), _data()
    changes = recalibrate(model, [x])
    z = torch.cat([x, model[1][0](nn.BatchNorm1d(3).double()(x))]).detach()
    assert_close(shared.running_mean, z.mean((0, 2)))
    assert_close(shared.running_var, z.var((0, 2), correction=0))
    assert len(changes) == 1


def test_only_the_running_statistics_change() -> None:
    model = nn.Sequential(
        nn.Dropout(0.9), nn.BatchNorm1d(3, momentum=None), BatchRenorm(3), nn.InstanceNorm1d(3)
    ).double()
    model[0].eval()
    model(_data())
    model[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    schedule = model[2].schedule
    recalibrate(model, [_data()])
    assert modes == [module.training for module in model.modules()]
    assert model[2].schedule is schedule
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"1.running_mean", "1.running_var", "2.running_mean", "2.running_std"}


def test_dropout_does_not_enter() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).double(), _data()
    recalibrate(model, [x])
    assert_close(model[1].running_var, x.var((0, 2), correction=0))


def test_batches_of_many_kinds_and_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nk.BatchNorm(3, layout="n * c")

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    x, mask = _data().transpose(1, 2), torch.rand(23, 4, 1) > 0.4
    model = Masked().double()
    recalibrate(model, ({"x": a, "mask": b} for a, b in zip(x.split(5), mask.split(5), strict=True)))
    assert_close(model.norm.running_mean, x[mask.squeeze(-1)].mean(0))
    assert_close(model.norm.running_var, x[mask.squeeze(-1)].var(0, correction=0))
    for batch in ((_data(), torch.zeros(23)), [_data()]):
        recalibrate(nn.BatchNorm1d(3).double(), [batch])
    norm = nn.BatchNorm1d(3).double()
    recalibrate(norm, [x], forward=lambda model, batch: model(batch.transpose(1, 2)))
    assert_close(norm.running_mean, x.mean((0, 1)))


def test_the_limit_is_kept() -> None:
    taken = []

    def batches():
        while True:
            taken.append(1)
            yield _data()

    recalibrate(nn.BatchNorm1d(3).double(), batches(), limit=3)
    assert len(taken) == 3


def test_a_large_mean_costs_no_accuracy() -> None:
    x = torch.randn(300, 3, 8) + 1e4
    norm = nn.BatchNorm1d(3)
    recalibrate(norm, x.split(7))
    # Kept in float32: one rounding.
    assert_close(norm.running_var.double(), x.double().var((0, 2), correction=0), rtol=1e-6, atol=0)


def test_a_failure_leaves_the_model() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).double().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected"):
        recalibrate(model, [_data(), torch.zeros(2, 3, 4, 5, dtype=torch.float64)])
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model[0].training
    assert not model[0]._forward_pre_hooks


def test_what_does_not_fit_is_refused() -> None:
    norm = nn.BatchNorm1d(3).double()
    with pytest.raises(OptionError, match="estimator"):
        recalibrate(norm, [_data()], estimator="median")
    with pytest.raises(OptionError, match="limit=0"):
        recalibrate(norm, [_data()], limit=0)
    with pytest.raises(SurgeryError, match="no batches"):
        recalibrate(norm, [])
    with pytest.raises(SurgeryError, match="no batch normalization"):
        recalibrate(nn.LayerNorm(3), [_data()])
    model = nn.Sequential(nn.Identity())
    model[0].never = norm
    with pytest.raises(SurgeryError, match=r"reached 0\.never"):
        recalibrate(model, [_data()])
