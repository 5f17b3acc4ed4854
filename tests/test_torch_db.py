"""torch's own samples of its norms and inputs of its norm modules, with normkit in torch's place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import normkit as nk
from foreign_norms import random_


def _group(x: Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float) -> Tensor:
    return nk.functional.group_norm(x, groups, weight, bias, eps)


def _batch(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float) -> Any:
    return nk.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _legit(x: Tensor, weight: Any, bias: Any, *rest: Any) -> Tensor:
    mean, var = rest[:2] if len(rest) == 5 else (None, None)
    training, momentum, eps = rest[-3:]
    return nk.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _updated(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Tensor:
    return nk.functional.batch_norm(x, mean, var, weight, bias, True, momentum, eps)


# The native operators return their statistics too, which are not part of what our functions give.
OURS: dict[str, Callable[..., Any]] = {
    "nn.functional.batch_norm": nk.functional.batch_norm,
    "nn.functional.layer_norm": nk.functional.layer_norm,
    "nn.functional.rms_norm": nk.functional.rms_norm,
    "nn.functional.group_norm": nk.functional.group_norm,
    "nn.functional.instance_norm": nk.functional.instance_norm,
    "nn.functional.local_response_norm": nk.functional.local_response_norm,
    "native_layer_norm": nk.functional.layer_norm,
    "native_group_norm": _group,
    "native_batch_norm": _batch,
    "_native_batch_norm_legit": _legit,
    "_batch_norm_with_update": _updated,
}
OPS = [op for op in op_db if op.name in OURS and not op.variant_test_name]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What is unlike torch's on purpose, with the reason. Nothing else may be.
DIFFERENCES = {"a negative eps": "refused: it is added to a variance, and a root of a negative sum is NaN"}


def difference(name: str, sample: Any) -> str | None:
    """Which deliberate difference a sample meets."""
    numbers = [sample.kwargs.get("eps", 1.0), *(a for a in sample.args[-1:] if isinstance(a, float))]
    return "a negative eps" if any(number < 0 for number in numbers) else None


def samples(op: Any, dtype: torch.dtype, requires_grad: bool = False) -> list[Any]:
    torch.manual_seed(0)
    return list(op.sample_inputs("cpu", dtype, requires_grad=requires_grad))


def given(sample: Any, change: Callable[[Tensor], Tensor] = Tensor.clone) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def of(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(of(value) for value in (sample.input, *sample.args)), {key: of(v) for key, v in sample.kwargs.items()}


def first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


each = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_torchs(op: Any, dtype: torch.dtype) -> None:
    for sample in samples(op, dtype):
        args, kwargs = given(sample)
        if difference(op.name, sample) is not None:
            with pytest.raises(ValueError, match="eps"):
                OURS[op.name](*args, **kwargs)
            continue
        wide_args, wide = given(sample, lambda value: value.double())
        if op.name == "nn.functional.rms_norm" and wide.get("eps") is None:
            wide["eps"] = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
        wanted = first(op(*wide_args, **wide))
        found = OURS[op.name](*args, **kwargs)
        assert found.dtype == dtype
        # Some roundings of the largest output.
        eps = 32 * torch.finfo(dtype).eps
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        assert_close(found.double(), wanted, rtol=eps, atol=eps * max(1.0, largest), equal_nan=True)
        if dtype == torch.float64:  # and what is remembered
            assert_close((args, kwargs), (wide_args, {key: wide[key] for key in kwargs}))


def of_leaves(op: Any, sample: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The function of the sample's inputs that have gradients."""
    args, kwargs = given(sample, lambda value: value.detach().clone().requires_grad_(value.requires_grad))
    places = [k for k, value in enumerate(args) if isinstance(value, Tensor) and value.requires_grad]
    names = [key for key, value in kwargs.items() if isinstance(value, Tensor) and value.requires_grad]

    def function(*leaves: Tensor) -> Tensor:
        there = [value.clone() if isinstance(value, Tensor) else value for value in args]
        named = {key: value.clone() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        for k, leaf in zip(places, leaves, strict=False):
            there[k] = leaf
        named |= dict(zip(names, leaves[len(places) :], strict=True))
        return OURS[op.name](*there, **named)

    return function, (*(args[k] for k in places), *(kwargs[key] for key in names))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, as forward mode is set up
@each
def test_derivatives_are_right(op: Any) -> None:
    for sample in samples(op, torch.float64, requires_grad=True):
        if difference(op.name, sample) is not None:
            continue
        function, leaves = of_leaves(op, sample)
        assert gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
        assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("op", [op for op in OPS if op.error_inputs_func is not None], ids=lambda op: op.name)
def test_what_torch_refuses_is_refused_alike(op: Any) -> None:
    for case in op.error_inputs("cpu"):
        args, kwargs = given(case.sample_input)
        with pytest.raises(case.error_type):
            OURS[op.name](*args, **kwargs)


OURS_module_db: dict[str, Callable[..., nn.Module]] = {
    **{f"nn.BatchNorm{k}d": nk.BatchNorm for k in (1, 2, 3)},
    **{f"nn.InstanceNorm{k}d": partial(nk.InstanceNorm, spatial=k) for k in (1, 2, 3)},
    "nn.GroupNorm": nk.GroupNorm,
    "nn.LayerNorm": nk.LayerNorm,
    "nn.RMSNorm": nk.RMSNorm,
    "nn.LocalResponseNorm": nk.LocalResponseNorm,
}
MODULES = [info for info in module_db if info.name in OURS_module_db]

# What is unlike torch's on purpose, with the reason. Nothing else may be.
DIFFERENCES_module_db = {
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
            random_(theirs)
            ours = OURS_module_db[info.name](*args, **kwargs).to(dtype)
            ours.load_state_dict(theirs.state_dict(), strict=True)
            theirs.load_state_dict(ours.state_dict(), strict=True)
            theirs.train(training)
            ours.train(training)
            where = f"{info.name} {given.desc} {name}"
            wanted, found = passes(theirs, other), passes(ours, other)
            assert_close(found, wanted, **close, msg=lambda text, where=where: f"{where}: {text}")
            assert_close(ours.state_dict(), theirs.state_dict(), **close)


REFUSING = [info for info in MODULES if info.module_error_inputs_func is not None]


@pytest.mark.parametrize("info", REFUSING, ids=lambda info: info.name)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_torch_refuses_is_refused_alike_module_db(info: Any, training: bool) -> None:
    for case in info.module_error_inputs_func(info, "cpu", torch.float32, False, training):
        given = case.module_error_input
        if given.constructor_input.kwargs.get("eps") == 0.0:
            continue  # see DIFFERENCES
        with pytest.raises((ValueError, RuntimeError)):
            OURS_module_db[info.name](*given.constructor_input.args, **given.constructor_input.kwargs).train(training)(
                *given.forward_input.args
            )
