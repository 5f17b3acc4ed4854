"""A trained model's batch normalizations weigh the example at inference."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.core.errors import OptionError, SurgeryError
from normkit.surgery.example_weighing import ALPHAS, choose_alpha, weigh_examples


def _model() -> nn.Module:
    shared = nn.BatchNorm2d(4, eps=1e-3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared, nn.Flatten(), nk.BatchNorm(4 * 25))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        model(torch.randn(8, 3, 5, 5))
    return model.double()


def test_alpha_zero_computes_what_the_model_did() -> None:
    model, x = _model().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
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


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SurgeryError, match="no BatchGroupNorm"):
        choose_alpha(nn.ReLU(), lambda m: 0.0)
    with pytest.raises(OptionError, match="from 0 to 1"):
        choose_alpha(BatchGroupNorm(4), lambda m: 0.0, [2.0])
    with pytest.raises(SurgeryError, match="no batch normalization"):
        weigh_examples(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(OptionError, match="count=1"):
        weigh_examples(nn.BatchNorm1d(3), count=1)


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
