"""Surgery on statistics: recalibrated, frozen, and weighing the example."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from foreign_norms import random_, wired
from normkit import BatchGroupNorm, BatchRenorm, GhostBatchNorm, MeanOnlyBatchNorm, recalibrate
from normkit.core.errors import SurgeryError
from normkit.surgery import choose_alpha, freeze, unfreeze, weigh_examples
from normkit.surgery.example_weighing import ALPHAS


def _data() -> Tensor:
    return torch.cumsum(torch.randn(23, 3, 4, dtype=torch.float64), 0)  # batches differ much


BATCH = [nn.BatchNorm1d, nk.BatchNorm, GhostBatchNorm, BatchGroupNorm, BatchRenorm, MeanOnlyBatchNorm]


@pytest.mark.parametrize("make", BATCH)
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


MIXED = [nk.SwitchableNorm(3), nk.ExemplarNorm(4), nk.ConditionalNorm(3, classes=2, over="n *")]


@pytest.mark.parametrize("norm", MIXED, ids=repr)
def test_layers_with_a_batch_among_other_things_are_estimated_too(norm: nn.Module) -> None:
    channels = norm.running_mean.numel()
    x = torch.cumsum(torch.randn(23, channels, 4, dtype=torch.float64), 0)
    more = (torch.arange(23) % 2,) if isinstance(norm, nk.ConditionalNorm) else ()
    parts = zip(x.split(10), *(part.split(10) for part in more), strict=True)
    changes = recalibrate(norm.double(), parts, forward=lambda model, batch: model(*batch))
    assert len(changes) == 1
    assert_close((norm.running_mean, norm.running_var), (x.mean((0, 2)), x.var((0, 2), correction=0)))


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
    assert_close((norm.running_mean, norm.running_var), (real.mean(0), real.var(0, correction=0)))


OTHERS = [nn.InstanceNorm1d(3, track_running_stats=True), nk.RecurrentBatchNorm(4, "frame", 5)]


@pytest.mark.parametrize("norm", OTHERS, ids=repr)
def test_other_running_statistics_are_left_and_told(norm: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), norm).double()
    before = copy.deepcopy(norm.state_dict())
    changes = recalibrate(model, [_data()])
    assert [row.layer for row in changes] == ["0"]
    assert [left.layer for left in changes.passed_over] == ["1"]
    assert_close(norm.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(SurgeryError, match=r"\(model\): it"):
        recalibrate(norm, [_data()])


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
    assert_close((shared.running_mean, shared.running_var), (z.mean((0, 2)), z.var((0, 2), correction=0)))
    assert len(changes) == 1


def test_only_the_running_statistics_change() -> None:
    norms = nn.BatchNorm1d(3, momentum=None), BatchRenorm(3), nn.InstanceNorm1d(3)
    model = nn.Sequential(nn.Dropout(0.9), *norms).double()
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

    x, mask = _data().transpose(1, 2), torch.rand(23, 4, 1) > 0.4
    model = wired(lambda self, x, mask: self.norm(x, mask=mask), norm=nk.BatchNorm(3, layout="n * c")).double()
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


def test_a_norm_that_no_batch_reaches_is_told() -> None:
    model = nn.Sequential(nn.Identity())
    model[0].never = nn.BatchNorm1d(3).double()
    with pytest.raises(SurgeryError, match=r"reached 0\.never"):
        recalibrate(model, [_data()])


def _model() -> nn.Module:
    norms = nn.BatchNorm2d(4), nk.BatchNorm(4), nn.InstanceNorm2d(4, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(3, 4, 1), *norms)


@pytest.mark.parametrize(
    "way",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.compile(m, backend="eager")],
)
def test_statistics_stay_through_training(way) -> None:
    model, x = _model(), torch.randn(4, 3, 5, 5) + 2
    model(x)
    wanted, keys = model.eval()(x), list(model.state_dict())
    changes = freeze(model)
    assert len(changes.rows) == 3
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = way(model)
    assert_close(other.train()(x), wanted)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert list(model.state_dict()) == keys
    assert not any(p.requires_grad for layer in list(model)[1:] for p in layer.parameters())
    assert model[0].weight.requires_grad


def test_it_is_undone_and_let_go() -> None:
    model, x = _model(), torch.randn(4, 3, 5, 5) + 2
    before = copy.deepcopy(model)
    freeze(model, "re:^1").undo()
    assert model[1].training
    assert all(p.requires_grad for p in model.parameters())
    assert not model[1]._forward_pre_hooks
    freeze(model, "re:^1|2", affine=False)
    assert model[1].weight.requires_grad
    model.train()(x)
    assert_close(model[1].running_mean, before[1].running_mean, rtol=0, atol=0)
    with pytest.raises(nk.errors.SurgeryError, match="it is frozen; unfreeze it first"):
        nk.recalibrate(model[1:3], [torch.randn(4, 4, 5, 5)])
    assert len(nk.fold(copy.deepcopy(model).eval(), x).rows) == 1
    unfreeze(model)
    model(x)
    assert (model[1].running_mean - before[1].running_mean).abs().max() > 0.1
    freeze(model, statistics=False)
    model.train()(x)
    assert not model[1].weight.requires_grad
    assert model[1].num_batches_tracked == 2


def _model_example_weighing() -> nn.Module:
    shared = nn.BatchNorm2d(4, eps=1e-3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared, nn.Flatten(), nk.BatchNorm(4 * 25))
    random_(model)
    for _ in range(3):
        model(torch.randn(8, 3, 5, 5))
    return model.double()


def test_alpha_zero_computes_what_the_model_did() -> None:
    model, x = _model_example_weighing().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    like, weight = copy.deepcopy(model), model[1].weight
    changes = weigh_examples(model)
    assert [row.layer for row in changes] == ["1", "5"]
    assert model[1] is model[3]
    assert model[1].weight is weight
    assert not model[1].training
    assert_close(model(x), like(x))
    weigh_examples(like, alpha=0.5)
    assert (model(x) - like(x)).abs().max() > 1e-3


def test_count_makes_the_variance_the_populations() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    made = weigh_examples(norm, alpha=0.2, count=8).model
    assert isinstance(made, BatchGroupNorm)
    assert made.alpha == 0.2
    assert_close(made.running_var, norm.state_dict()["running_var"] * 7 / 8)


def test_alpha_is_chosen_by_score() -> None:
    model = nn.Sequential(BatchGroupNorm(4), nn.ReLU(), BatchGroupNorm(4))
    scores = choose_alpha(model, lambda m: -abs(m[0].alpha - 0.04))
    assert tuple(scores) == ALPHAS
    assert model[0].alpha == model[2].alpha == 0.05


def test_an_interruption_leaves_the_alphas_that_were_there() -> None:
    model = nn.Sequential(BatchGroupNorm(4, alpha=0.3), BatchGroupNorm(4, alpha=0.4)).train()

    def interrupted(m: nn.Module) -> float:
        if m[0].alpha == 0.05:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        choose_alpha(model, interrupted)
    assert [norm.alpha for norm in model] == [0.3, 0.4]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("norm", [nk.BatchChannelNorm(4, 2), nk.EstBatchNorm(4), nk.GhostBatchNorm(4)], ids=repr)
def test_what_does_more_than_batch_normalization_is_refused(norm: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), norm)
    with pytest.raises(SurgeryError, match=f"1 is {type(norm).__name__}, not plain"):
        weigh_examples(model)
    assert isinstance(model[0], nn.BatchNorm1d)
    assert model[1] is norm


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm(4), nk.SyncBatchNorm(4)], ids=["torch", "ours"])
def test_synchronized_batch_normalization_weighs_too(norm: nn.Module) -> None:
    assert isinstance(weigh_examples(nn.Sequential(norm)).model[0], BatchGroupNorm)
