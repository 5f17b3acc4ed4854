"""normkit's layers in the place of torch's: the same function, parameters and keys."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from normkit.engine.layer import Layer


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.GroupNorm(4, 8),
        nn.InstanceNorm2d(8, affine=True),
        nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        nn.Flatten(),
        nn.LazyLinear(12),
        nn.LayerNorm(12, eps=1e-6),
        nn.RMSNorm(12),
        nn.LayerNorm((12,), bias=False),
    )


def test_it_computes_the_same_with_the_same_parameters() -> None:
    model, x = network().double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model(x)
    theirs, keys = copy.deepcopy(model), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    changes = nk.accelerate(model, example=x)
    assert len(changes.rows) == 6
    said = {row.before.partition("(")[0] for row in changes if "no longer holds" in row.note}
    assert said == {"BatchNorm2d", "InstanceNorm2d"}
    assert sum(isinstance(module, Layer) for module in model.modules()) == 6
    assert list(model.state_dict()) == keys
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    for training in (True, False):
        model.train(training)
        theirs.train(training)
        found, wanted = (m(x).square().sum() for m in (model, theirs))
        assert_close(found, wanted, rtol=1e-9, atol=1e-9)  # float64, a few operations
        gradients = [torch.autograd.grad(y, list(m.parameters())) for y, m in ((found, model), (wanted, theirs))]
        assert_close(*gradients, rtol=1e-7, atol=1e-7)  # nine layers deep
    assert_close(model.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-9)


class LateNorm(nn.Module):
    """Root mean square normalization as language models write it: with statistics in float32."""

    def __init__(self, size: int, offset: float = 0.0, early: bool = True) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(size)), 1e-6
        self.offset, self.early = offset, early

    def normalized(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        y, gain = self.normalized(hidden_states), self.offset + self.weight
        return gain * y.to(hidden_states.dtype) if self.early else (y * gain.float()).to(hidden_states.dtype)


class LlamaRMSNorm(LateNorm):
    """Rounds before the weight."""


class GemmaRMSNorm(LateNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size, offset=1.0, early=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return (self.normalized(hidden_states) * (1.0 + self.weight.float())).type_as(hidden_states)


class CenteredNorm(LateNorm):
    """Layer normalization without a bias, in float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x - x.mean(-1, keepdim=True)
        return (self.weight.float() * self.normalized(x)).to(hidden_states.dtype)


class BareNorm(nn.Module):
    """Layer normalization without parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.normalized_shape = (size,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        return nn.functional.layer_norm(x, self.normalized_shape, None, None, eps=1e-5).to(hidden_states.dtype)


class ChannelsNorm(nn.LayerNorm):
    """Over the channels of images."""

    def forward(self, input: Tensor) -> Tensor:
        x = nn.functional.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class BatchNormAct(nn.BatchNorm2d):
    """Norm, dropout and activation in one layer."""

    def __init__(self, size: int, act: nn.Module, p: float = 0.0) -> None:
        super().__init__(size)
        self.drop, self.act = nn.Dropout(p) if p else nn.Identity(), act

    def forward(self, input: Tensor) -> Tensor:
        y = nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        if self.training:
            self.num_batches_tracked.add_(1)
        return self.act(self.drop(y))


class GroupNormAct(nn.GroupNorm):
    def __init__(self, size: int) -> None:
        super().__init__(2, size)
        self.act = nn.SiLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(nn.functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps))


LAST, FIRST = (4, 5, 8), (4, 8, 5, 6)
FAMILIES = {
    "Llama": (LlamaRMSNorm(8), LAST, "RMSNorm((8,), eps=1e-06, elementwise_affine=True, cast='before weight')"),
    "late": (LateNorm(8, early=False), LAST, "RMSNorm((8,), eps=1e-06, elementwise_affine=True)"),
    "Gemma": (GemmaRMSNorm(8), LAST, "RMSNorm((8,), eps=1e-06, elementwise_affine=True, offset=1.0)"),
    "no bias": (CenteredNorm(8), LAST, "LayerNorm((8,), eps=1e-06, elementwise_affine=True, bias=False)"),
    "bare": (BareNorm(8), LAST, "LayerNorm((8,), eps=1e-05, elementwise_affine=False, bias=False)"),
    "channels": (ChannelsNorm(8), FIRST, "LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True, over='c')"),
    "bn relu": (BatchNormAct(8, nn.ReLU()), FIRST, "BatchNorm("),
    "bn": (BatchNormAct(8, nn.Identity()), FIRST, "BatchNorm("),
    "gn silu": (GroupNormAct(8), FIRST, "GroupNorm("),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_any_make_are_known_by_what_they_compute(family: str, dtype: torch.dtype) -> None:
    norm, shape, wanted = FAMILIES[family]
    model, x = nn.ModuleDict({"norm": copy.deepcopy(norm)}).to(dtype), torch.randn(shape).to(dtype)
    theirs, state = copy.deepcopy(model["norm"]), list(model.state_dict())
    parameters, changes = list(model.parameters()), nk.accelerate(model)
    assert not changes.passed_over
    assert str(model["norm"]).startswith(wanted)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state
    for training in (True, False):
        y, z = model["norm"].train(training)(x), theirs.train(training)(x)
        assert y.dtype == z.dtype
        if dtype == torch.bfloat16 and isinstance(model["norm"], nk.RMSNorm):
            assert (y == z).float().mean() > 0.98  # the same order of rounding
        # Classes that compute in float32 whatever comes in; bfloat16 keeps 8 bits.
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert_close(y, z, rtol=tolerance, atol=tolerance)


def test_what_it_can_not_take_over_is_said() -> None:
    class TwiceNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    model = nn.Sequential(
        BatchNormAct(4, nn.Hardswish()),
        BatchNormAct(4, nn.ReLU(), p=0.5),
        TwiceNorm(4),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.SyncBatchNorm(4),
        nn.LayerNorm(4),
    )
    changes = nk.accelerate(model)
    assert [row.layer for row in changes] == ["5"]
    reasons = [left.reason for left in changes.passed_over]
    for reason, wanted in zip(
        reasons,
        ["applies Hardswish too", "applies Sequential too", "fits neither", "keeps running", "no faster kernel"],
        strict=True,
    ):
        assert wanted in reason
    with pytest.raises(nk.errors.SurgeryError, match=r"0 \(BatchNormAct\): it applies Hardswish"):
        nk.accelerate(model, on_refusal="raise")


def test_what_it_leaves_and_refuses() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nk.LayerNorm(3), nn.LayerNorm(3))
    kept = list(model)
    assert [row.layer for row in nk.accelerate(model).rows] == ["2"]
    assert model[0] is kept[0]
    assert model[1] is kept[1]
    assert nk.accelerate(model).rows == ()
    with pytest.raises(nk.errors.SurgeryError, match="does not run"):
        nk.accelerate(nn.Sequential(nn.LayerNorm(3)), example=torch.randn(2, 5))
    root = nk.accelerate(nn.LayerNorm(3)).model
    assert isinstance(root, nk.LayerNorm)


def test_running_statistics_of_a_half_model_become_wide() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).bfloat16()
    x = torch.randn(2, 3, 5, 5).bfloat16()
    model(x)
    wanted, before = copy.deepcopy(model).eval()(x), copy.deepcopy(model[1].state_dict())
    nk.accelerate(model)
    assert model[1].running_var.dtype == torch.float32
    assert_close(model[1].running_var, before["running_var"].float(), rtol=0, atol=0)
    assert_close(model.eval()(x), wanted)
