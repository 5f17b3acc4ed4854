"""Biases that the normalization behind them cancels."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from normkit.core.errors import SurgeryError
from normkit.surgery.attach import tied_parameters
from normkit.surgery.changes import Change, Changes, PassedOver, label
from normkit.surgery.norms import describe, is_norm
from normkit.surgery.transaction import Transaction
from normkit.surgery.watch import Watch, forked, modes_kept, run_on, tensors_in

# About a thousand roundings, by which outputs may differ where later layers amplify the first one's rounding.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def drop_redundant_bias(model: nn.Module, example: Any, *, optimizer: torch.optim.Optimizer | None = None) -> Changes:
    """Drop the bias of each Conv, ConvTranspose and Linear that the norm behind it cancels, in place.

    Batch and instance normalization, and group normalization with one channel a group, cancel a bias per channel; layer
    normalization, and groups of several channels, do not. Which norm is behind which layer is seen in a run on the example: the
    layer's output must be the very input of the norm, and be read by nothing else. Then it is proved: the norm, with random
    parameters, must give the same for that input with random numbers added to each channel, and the model what it gave, both in
    training and evaluation. Running means take the dropped bias over, so that evaluation computes what it did.

    Args:
        model: any module.
        example: an input: a tensor, a tuple of arguments, or a dict of them; of several samples.
        optimizer: of the model's parameters, from which the dropped ones are taken. Default: None.

    Raises:
        SurgeryError: the model does not run on the example in training mode.

    Reference: Ioffe and Szegedy, "Batch Normalization" (2015), https://arxiv.org/abs/1502.03167, section 3.2.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.GroupNorm(2, 4))
    >>> print(drop_redundant_bias(model, torch.randn(2, 3, 5, 5)))
    layer  before  after    note
    0      bias    no bias  BatchNorm2d(8) cancels it
    passed over
    2      GroupNorm(2, 4) does not cancel it
    """
    names = {id(module): name for name, module in model.named_modules()}
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)]
    watches = {training: Watch(layers, norms.values()) for training in (True, False)}
    seen: dict[int, Tensor] = {}
    handles = [norm.register_forward_pre_hook(_keep(seen)) for norm in norms.values()]
    try:
        first = {training: _outputs(model, example, training, watch) for training, watch in watches.items()}
    finally:
        for handle in handles:
            handle.remove()
    rows, left, opened = [], [], Transaction(model, optimizer)
    for norm in norms.values():
        found = watches[True].layer_before(norm)
        if isinstance(found, str) or found[0].bias is None:
            continue
        layer = found[0]
        reason = _refusal(model, layer, norm)
        if not reason and watches[False].layer_before(norm) != found:
            reason = "in evaluation other layers are joined than in training"
        if not reason and not _cancels(layer, norm, seen[id(norm)]):
            reason = f"{describe(norm)} does not cancel it"
        reason = reason or _drop(model, example, layer, norm, first)
        if reason:
            left.append(PassedOver(label(names[id(layer)]), reason))
        else:
            rows.append(Change(label(names[id(layer)]), "bias", "no bias", f"{describe(norm)} cancels it"))
    return opened.close(model, rows, left)


def _keep(seen: dict[int, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen[id(norm)] = args[0]  # itself: a copy would be one more reader

    return hook


def _outputs(model: nn.Module, example: Any, training: bool, watch: Watch | None = None) -> list[Tensor]:
    """What the model gives in a mode; it is left as it was, and dropout draws the same each time."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), modes_kept(model), forked() as seed:
            model.train(training)
            seed()
            result = run_on(model, example) if watch is None else watch.run(lambda: run_on(model, example))
            return [part.clone() for part in tensors_in(result)]
    except Exception as error:
        mode = "training" if training else "evaluation"
        raise SurgeryError(
            f"drop_redundant_bias: the model does not run on the example in {mode}: {type(error).__name__}: {error}"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _refusal(model: nn.Module, layer: nn.Module, norm: nn.Module) -> str:
    if parametrize.is_parametrized(layer, "bias"):
        return "it is parametrized"
    if id(layer.bias) in tied_parameters(model):
        return "it is tied to another parameter"
    if any(getattr(part, hooks) for part in (layer, norm) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
        return "the layer or the norm has hooks"
    return ""


def _cancels(layer: nn.Module, norm: nn.Module, z: Tensor) -> bool:
    """Whether a norm with random parameters gives the same when a number is added to each of the layer's output channels."""
    try:
        twin = copy.deepcopy(norm).double()
        generator = torch.Generator().manual_seed(0)
        assert isinstance(layer.bias, Tensor)
        numbers = torch.randn(layer.bias.shape, generator=generator, dtype=torch.float64).to(z.device)
        with torch.no_grad(), forked() as seed:
            for parameter in twin.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            channels = z.dim() - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)
            moved = z.double() + numbers.view([-1 if d == channels else 1 for d in range(z.dim())])
            for training in (True, False):
                other = copy.deepcopy(twin).train(training)
                seed()
                wanted = twin.train(training)(z.double())
                _shift(other, numbers)
                seed()
                torch.testing.assert_close(other(moved), wanted, rtol=1e-6, atol=1e-6)
    except (AssertionError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _shift(norm: nn.Module, numbers: Tensor) -> None:
    mean = getattr(norm, "running_mean", None)
    if isinstance(mean, Tensor):
        norm._buffers["running_mean"] = mean + numbers.to(mean.dtype)


def _drop(model: nn.Module, example: Any, layer: nn.Module, norm: nn.Module, first: dict[bool, list[Tensor]]) -> str:
    """Drop a bias if the model gives what it gave; else the reason why it was put back."""
    bias, mean = layer.bias, norm._buffers.get("running_mean")
    assert isinstance(bias, nn.Parameter)
    with torch.no_grad():
        _shift(norm, -bias)
    layer.register_parameter("bias", None)
    try:
        for training, wanted in first.items():
            for old, new in zip(wanted, _outputs(model, example, training), strict=True):
                if not old.is_floating_point():
                    torch.testing.assert_close(new, old, rtol=0, atol=0)
                elif old.numel():
                    allowed = _TOLERANCE[old.dtype] * float(old.abs().max())
                    torch.testing.assert_close(new, old, rtol=0, atol=allowed, equal_nan=True)
    except (AssertionError, SurgeryError, ValueError) as error:
        layer.bias = bias
        if mean is not None:
            norm._buffers["running_mean"] = mean
        return "the model gives something else without: " + str(error).splitlines()[0]
    return ""
