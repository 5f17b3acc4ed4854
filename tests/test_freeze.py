"""Frozen batch normalization stays as it is through train(), copies and pickles, and is let go again."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.surgery import freeze, unfreeze


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nk.BatchNorm(4), nn.InstanceNorm2d(4, track_running_stats=True)
    )


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


def test_what_can_not_be_frozen_is_said() -> None:
    with pytest.raises(nk.errors.SurgeryError, match="no layer of the model keeps running statistics"):
        freeze(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(nk.errors.OptionError, match="leave nothing to freeze"):
        freeze(_model(), statistics=False, affine=False)
