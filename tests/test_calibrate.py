"""New norms that are fitted to what the old ones gave."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from foreign_norms import random_
from normkit.core.errors import SurgeryError
from normkit.surgery.convert import convert


def trained_batch_norms() -> nn.Sequential:
    body = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()
    for layer in body[1::3]:
        nn.init.normal_(layer.weight, 1.0, 0.3)
        nn.init.normal_(layer.bias)
    for _ in range(30):
        model(torch.randn(16, 3, 6, 6).double() + 1)
    return model.eval()


@pytest.mark.parametrize("to", ["gn:4", "ln", "in", "dyt"])
def test_calibration_fits_new_norms_to_what_the_old_ones_gave(to):
    model, batches = trained_batch_norms(), [torch.randn(16, 3, 6, 6).double() + 1 for _ in range(4)]
    swapped, state = convert(deepcopy(model), to).model, deepcopy(model.state_dict())
    wanted = torch.cat([model(x) for x in batches])

    def error(other):
        return ((torch.cat([other(x) for x in batches]) - wanted).norm() / wanted.norm()).item()

    before = error(swapped)
    changes = convert(model, to, calibrate=iter(batches))
    assert [row.layer for row in changes] == ["2", "5", "8", "(model)"]
    assert changes.rows[-1].before == f"error {before:.2g}"
    assert changes.rows[-1].error == pytest.approx(error(model))
    assert error(model) < 0.8 * before
    for row in list(changes)[:-1]:
        assert row.error is not None
        assert "before calibration" in row.note
    assert changes.undo() is model
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_calibration_finds_what_a_gain_and_a_bias_can_give():
    norm = random_(nn.GroupNorm(8, 8)).double()
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), norm).double(), torch.randn(4, 3, 5, 8).double()
    wanted, weight = model(x), norm.weight
    changes = convert(model, "in", calibrate=[(x, "targets are not read")])
    assert model[1].weight is weight
    assert changes.rows[0].error == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(model(x), wanted)
    for to, why in (("bn", "it normalizes by running"), ("rms", "it has no gain and bias"), ("none", "it has no gain")):
        note = convert(nn.Sequential(nn.GroupNorm(2, 4)), to, calibrate=[torch.randn(3, 4, 2)]).rows[0].note
        assert f"not calibrated: {why}" in note
    with pytest.raises(SurgeryError, match="calibrate has no batches"):
        convert(model, "ln", calibrate=[])


def test_every_channel_keeps_its_mean_and_deviation_in_the_changed_model():
    model, batches = trained_batch_norms(), [torch.randn(n, 3, 6, 6).double() + 1 for n in (16, 7)]

    def moments(layer):
        seen = []
        handle = layer.register_forward_hook(lambda _, args, y: seen.append(y.movedim(1, 0).flatten(1)))
        for x in batches:
            model(x)
        handle.remove()
        return torch.stack(torch.std_mean(torch.cat(seen, 1), 1))

    wanted = [moments(model[k]) for k in (2, 5, 8)]
    convert(model, "gn:4", calibrate=batches)
    torch.testing.assert_close([moments(model[k]) for k in (2, 5, 8)], wanted, rtol=1e-9, atol=1e-9)  # float64
