"""torch's own inputs of its norm modules, with normkit in torch's place.

Two passes of training with gradients and one of evaluation, in every memory format that the input may have, and the checkpoint
both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db

import normkit as nk

OURS: dict[str, Callable[..., nn.Module]] = {
    **{f"nn.BatchNorm{k}d": nk.BatchNorm for k in (1, 2, 3)},
    **{f"nn.InstanceNorm{k}d": partial(nk.InstanceNorm, spatial=k) for k in (1, 2, 3)},
    "nn.GroupNorm": nk.GroupNorm,
    "nn.LayerNorm": nk.LayerNorm,
    "nn.RMSNorm": nk.RMSNorm,
    "nn.LocalResponseNorm": nk.LocalResponseNorm,
}
MODULES = [info for info in module_db if info.name in OURS]

# What is unlike torch's on purpose, with the reason. Nothing else may be.
DIFFERENCES = {
    "eps of 0": "taken by every norm, as torch's LayerNorm, RMSNorm, GroupNorm and InstanceNorm take it; its BatchNorm does not"
}


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other memory."""
    found = {"contiguous": x, "steps of two": x.repeat_interleave(2, -1)[..., ::2]}
    if x.dim() > 1:
        found["transposed"] = x.transpose(0, 1).contiguous().transpose(0, 1)
    if x.dim() > 2:
        found["channels last"] = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return found


def passes(module: nn.Module, x: Tensor) -> list[Any]:
    """Outputs, gradients and state of two passes in the module's mode."""
    found: list[Any] = []
    for _ in range(2):
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        direction = torch.linspace(0, 7, y.numel(), dtype=y.dtype).sin().reshape(y.shape)
        found += [y.detach(), *torch.autograd.grad((y * direction).sum(), [leaf, *module.parameters()])]
    return found


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules_are_torchs(info: Any, training: bool, dtype: torch.dtype) -> None:
    # Sums in another order: a few units in the last place, more in gradients, where they nearly cancel.
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for given in info.module_inputs_func(info, "cpu", dtype, True, training):
        args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
        (x,) = given.forward_input.args
        for name, other in layouts(x.detach()).items():
            theirs = info.module_cls(*args, **kwargs).to(dtype)
            for parameter in theirs.parameters():
                nn.init.normal_(parameter)
            ours = OURS[info.name](*args, **kwargs).to(dtype)
            ours.load_state_dict(theirs.state_dict(), strict=True)
            theirs.load_state_dict(ours.state_dict(), strict=True)
            theirs.train(training)
            ours.train(training)
            where = f"{info.name} {given.desc} {name}"
            wanted, found = passes(theirs, other), passes(ours, other)
            assert_close(found, wanted, **close, msg=lambda text, where=where: f"{where}: {text}")
            assert_close(ours.state_dict(), theirs.state_dict(), **close)


@pytest.mark.parametrize(
    "info", [info for info in MODULES if info.module_error_inputs_func is not None], ids=lambda info: info.name
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_torch_refuses_is_refused_alike(info: Any, training: bool) -> None:
    for case in info.module_error_inputs_func(info, "cpu", torch.float32, False, training):
        given = case.module_error_input
        if given.constructor_input.kwargs.get("eps") == 0.0:
            continue  # see DIFFERENCES
        with pytest.raises((ValueError, RuntimeError)):
            OURS[info.name](*given.constructor_input.args, **given.constructor_input.kwargs).train(training)(
                *given.forward_input.args
            )
