"""Fold: bake normalizations into the weights for inference, and prove on an example that nothing changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normkit.catalogue.methods import METHODS
from normkit.core.errors import SurgeryError
from normkit.surgery.attach import tied_parameters
from normkit.surgery.bake import bake
from normkit.surgery.changes import Change, Changes, PassedOver, label
from normkit.surgery.norms import Norm, describe, is_norm, read_norm
from normkit.surgery.substitute import replace_modules
from normkit.surgery.transaction import Transaction, transaction
from normkit.surgery.watch import Watch, run_on, tensors_in

# In evaluation one scale and shift for each channel, as their cards claim and the tests hold them to.
_FOLDABLE = frozenset(card.module for card in METHODS if card.kind == "activation" and card.foldable)
# About a thousand roundings, by which a folded network may differ where later layers amplify the first one's rounding.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def fold(model: nn.Module, example: Any = None, *, tolerance: float | None = None) -> Changes:
    """Bake normalizations into the weights of a model, in place, for inference.

    Every weight parametrization becomes its value. With an example also each BatchNorm, and each member of its family whose card
    says that it folds, goes into the Conv, ConvTranspose or Linear before it, W' = (weight / s) W, b' = bias + (b - mean)
    weight / s, s = sqrt(var + eps) (the running deviation or 1 where that is what the norm keeps), if in a run on the example
    the layer's output is the very input of the norm and nothing else reads it; the norm becomes an Identity. After each fold
    the model's output is compared with the first one; beyond the tolerance the fold is undone. A branch that the example does
    not take is not seen: give one that takes it.

    Args:
        model: any module; with an example, in evaluation mode.
        example: an input: a tensor, a tuple of arguments, or a dict of them. Default: None, weights only.
        tolerance: largest difference of outputs that counts as none, relative to their largest value. Default: by the dtype of
            the output, 1e-4 in float32, 1e-10 in float64.

    Returns:
        The model, a row per weight and per such norm with the error, the norms that were passed over with the reason, and the
        way back.

    Raises:
        SurgeryError: a tied weight would be untied; the model is not in evaluation mode, or does not give the same finite output
            twice. The model is left as it was.

    Reference:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018),
        https://arxiv.org/abs/1712.05877, section 3.2.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double().eval()
    >>> changes = fold(model, torch.ones(1, 3, 5, 5).double())
    >>> changes.rows[0].before, changes.rows[0].after, model[1]
    ('BatchNorm2d(8)', 'Identity()', Identity())
    """
    if example is None:
        with transaction(model) as opened:
            return opened.close(model, bake(model))
    for name, module in model.named_modules():
        if module.training:
            raise SurgeryError(
                f"fold: {label(name)} is in training mode, where a norm has no fixed factors; call model.eval() first"
            )
    first = _outputs(model, example)
    varies, allowed = _difference(first, _outputs(model, example))
    if varies > allowed or not all(bool(torch.isfinite(part).all()) for part in first):
        raise SurgeryError(
            "fold: the model does not give the same finite output twice on the example, so that no fold can be proved"
        )
    opened, left = Transaction(model), []
    rows = bake(model)
    if rows:
        error = _difference(first, _outputs(model, example))[0]
        rows = [replace(row, note="all weights together", error=error) for row in rows]
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)]
    watch = Watch(layers, norms.values())
    watch.run(lambda: run_on(model, example))
    names = {id(module): name for name, module in model.named_modules()}
    ties = tied_parameters(model)
    for name, module in norms.items():
        try:
            norm = _read(name, module)
        except SurgeryError as error:
            left.append(PassedOver(label(name), str(error).removeprefix(f"{label(name)}: ")))
            continue
        if norm.kind not in ("batch_norm", "sync_batch_norm") and type(module) not in _FOLDABLE:
            continue
        found = watch.layer_before(module)
        reason = found if isinstance(found, str) else _refusal(norm, module, *found, ties)
        if reason or isinstance(found, str):
            left.append(PassedOver(label(name), str(reason)))
            continue
        done = _fold_one(model, example, first, name, module, norm, found[0], names[id(found[0])], tolerance)
        (rows if isinstance(done, Change) else left).append(done)  # pyright: ignore[reportArgumentType]
    return opened.close(model, rows, left)


def _read(name: str, module: nn.Module) -> Norm:
    """As ``read_norm``, and members of the batch family that are no subclass of torch's."""
    if type(module) not in _FOLDABLE or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return read_norm(name, module)
    if "forward" in vars(module):
        raise SurgeryError(f"{label(name)}: its forward was replaced on the object; undo that first")
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    count = module.num_features
    assert isinstance(count, int)
    axes = "n * c" if getattr(module, "layout", "n c *") == "n * c" else "n c *"
    eps = getattr(module, "eps", 0.0)
    tracks = module._buffers["running_mean"] is not None
    return Norm(type(module).__name__, axes, (count,), eps, weight, bias, tracks=tracks)


def _refusal(norm: Norm, module: nn.Module, layer: nn.Module, rank: int, ties: dict[int, list[str]]) -> str:
    """Why a norm can't go into the layer before it; empty if it can."""
    if not norm.tracks:
        return "it keeps no running statistics, and so depends on the batch"
    if any(getattr(part, hooks) for part in (layer, module) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
        return "it or the layer before it has hooks"
    if any(id(parameter) in ties for parameter in layer.parameters(recurse=False)):
        return "the weight of the layer before it is tied to another"
    if isinstance(layer, _ConvNd):
        fits = norm.axes == "n c *" and rank == len(layer.kernel_size) + 2
    else:
        fits = norm.axes == "n * c" or rank == 2
    return "" if fits else "its channels are not the output channels of the layer before it"


def _fold_one(
    model: nn.Module,
    example: Any,
    first: list[Tensor],
    name: str,
    module: nn.Module,
    norm: Norm,
    layer: nn.Module,
    layer_name: str,
    tolerance: float | None,
) -> Change | PassedOver:
    old = layer._parameters["weight"], layer._parameters.get("bias")
    identity = nn.Identity().eval()
    weight, bias = fold_batch_norm(layer, module, norm)
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    replace_modules(model, {id(module): identity})
    error, allowed = _difference(first, _outputs(model, example))
    if error <= (allowed if tolerance is None else tolerance):
        return Change(label(name), describe(module), describe(identity), f"folded into {label(layer_name)}", error)
    layer.register_parameter("weight", old[0])
    layer.register_parameter("bias", old[1])
    replace_modules(model, {id(identity): module})
    return PassedOver(label(name), f"folding it into {layer_name} changes the output by {error:.1e}")


def fold_batch_norm(layer: nn.Module, module: nn.Module, norm: Norm) -> tuple[nn.Parameter, nn.Parameter]:
    """The weight and bias of a layer that computes what the layer and a norm in evaluation after it compute.

    Args:
        layer: a Linear, Conv or ConvTranspose, in groups or not.
        module: a norm of the batch family, of running mean and running variance, deviation or neither.
        norm: the same as data.

    Returns:
        The parameters, of the dtype of the layer's; computed in float64.
    """
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    mean = module.get_buffer("running_mean").double()
    var, deviation = (module._buffers.get(name) for name in ("running_var", "running_std"))
    if var is not None:
        deviation = (var.double() + norm.guard(torch.float32)).sqrt()
    scale = torch.ones_like(mean) if deviation is None else deviation.double().reciprocal()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    assert weight is not None
    kernel = weight.detach().double()
    if isinstance(
        layer, _ConvTransposeNd
    ):  # (in, out / groups, *): the groups lie in the first axis, output channels in the second
        apart = kernel.unflatten(0, (layer.groups, -1))
        factors = scale.view(layer.groups, 1, -1, *[1] * (kernel.dim() - 2))
        kernel = (apart * factors).flatten(0, 1)
    else:
        kernel = kernel * scale.view(-1, *[1] * (kernel.dim() - 1))
    shift = -mean if bias is None else bias.detach().double() - mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return (
        nn.Parameter(kernel.to(weight.dtype), requires_grad=weight.requires_grad),
        nn.Parameter(
            shift.to(weight.dtype), requires_grad=weight.requires_grad if bias is None else bias.requires_grad
        ),
    )


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    try:
        with torch.no_grad():
            # Copies: an output may be a buffer of the model that the next run writes into.
            return [part.detach().clone() for part in tensors_in(run_on(model, example))]
    except Exception as error:
        raise SurgeryError(f"fold: the model does not run on the example: {type(error).__name__}: {error}") from error


def _difference(first: list[Tensor], now: list[Tensor]) -> tuple[float, float]:
    """The largest difference relative to the largest value of the output it is in, and what rounding explains."""
    if [part.shape for part in first] != [part.shape for part in now]:
        return float("inf"), 0.0
    errors, allowed = [0.0], [0.0]
    for a, b in zip(first, now, strict=True):
        if not a.is_floating_point():
            errors.append(0.0 if torch.equal(a, b) else float("inf"))
        elif a.numel():
            size = float(a.double().abs().max())
            error = float((a.double() - b.double()).abs().max()) / (size or 1.0)
            errors.append(error if error == error else float("inf"))
            allowed.append(_TOLERANCE.get(a.dtype, 1e-1))
    return max(errors), max(allowed)
