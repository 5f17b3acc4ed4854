"""Data-dependent initialization: weight-normalized layers start with pre-activations of mean 0 and variance 1."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations as torchs

from normkit.core.errors import SurgeryError
from normkit.core.moments import accumulation_dtype, moments
from normkit.core.support import show
from normkit.surgery.attach import parametrizations
from normkit.surgery.changes import Change, Changes, PassedOver, label
from normkit.surgery.transaction import Transaction
from normkit.surgery.watch import run_on
from normkit.weights.layout import weight_layout
from normkit.weights.weight_norm import WeightNorm

_WEIGHT_NORMS = (WeightNorm, torchs._WeightNorm)
_EPS = 1e-8


def data_dependent_init(model: nn.Module, batch: Any) -> Changes:
    """Set lengths g and biases b of weight-normalized layers, in place, so that their pre-activations are normalized on a batch.

    Layer by layer in order of execution, with t = v x / |v| over the batch and, of convolutions, all positions:
    g <- 1 / (std(t) + 1e-8), b <- -mean(t) / (std(t) + 1e-8) for each output unit, std the population's, so that afterwards every
    pre-activation has mean 0 and variance 1 on that batch. Call it once, before training, on a batch as large as fits.

    The model runs once in the mode that it has; other parameters and all buffers, as running statistics, are left as they were. A
    layer without bias is scaled alone. A layer that is called several times is set by the first call.

    Args:
        model: with weight normalization on Linear, Conv or ConvTranspose layers, by normkit or torch's parametrization.
        batch: an input: a tensor, a tuple of arguments, or a dict of them.

    Raises:
        SurgeryError: no layer is weight-normalized, or none is reached; lengths that are not one for each output unit, or under
            another parametrization; a unit that is constant or not finite on the batch; the model does not run. Nothing is
            changed then.

    Reference: Salimans and Kingma, "Weight Normalization" (2016), https://arxiv.org/abs/1602.07868, section 3.

    >>> from normkit.weights.weight_norm import weight_norm
    >>> layer = weight_norm(nn.Linear(1, 1))
    >>> layer.weight = torch.tensor([[2.0]])
    >>> print(data_dependent_init(layer, torch.tensor([[1.0], [5.0]])))
    layer    before      after        note
    (model)  Linear 1x1  g and b set  deviations were 2 to 2
    >>> layer(torch.tensor([[1.0], [5.0]])).detach().T
    tensor([[-1.,  1.]])
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd)
        and any(isinstance(part, _WEIGHT_NORMS) for part in parametrizations(module, "weight"))
    }
    if not layers:
        raise SurgeryError(
            "data_dependent_init: no Linear, Conv or ConvTranspose of the model is weight-normalized; put it on first, e.g. "
            'apply_recipe(model, "keep+wn")'
        )
    for name, layer in layers.items():
        _check(label(name), layer)
    rows: dict[str, Change] = {}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    opened = Transaction(model, written=[tensor for layer in layers.values() for tensor in _length_and_bias(layer)])
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_neutral(name, rows)))
            handles.append(layer.register_forward_hook(_normalize(name, rows), prepend=True))
        with torch.no_grad():
            run_on(model, batch)
        if not rows:
            raise SurgeryError("data_dependent_init: the batch reaches none of the weight-normalized layers")
    except BaseException as error:
        opened.restore()
        if isinstance(error, SurgeryError) or not isinstance(error, Exception):
            raise
        raise SurgeryError(
            f"data_dependent_init: the model does not run on the batch: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        _put_back(buffers)
    left = [PassedOver(label(name), "the batch does not reach it") for name in layers if name not in rows]
    return opened.close(model, rows.values(), left)


def _check(name: str, layer: nn.Module) -> None:
    """Refuse lengths that are not one for each output unit, or that another parametrization undoes."""
    parts = parametrizations(layer, "weight")
    if len(parts) > 1:
        stack = " and ".join(type(part).__name__ for part in parts[1:])
        raise SurgeryError(
            f"{name}: {stack} stands over its weight normalization, so that its lengths do not scale what it computes; "
            "initialize before that is put on"
        )
    length, *_ = _length_and_bias(layer)
    axis = weight_layout(layer).output_axis
    units = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
    assert isinstance(units, int)
    dim = parts[0].dim
    if length.numel() != units or (units > 1 and dim != axis):
        raise SurgeryError(
            f"{name}: its lengths (dim={dim}, {length.numel()} of them) are not one for each of its {units} output units, and "
            f"can't be set unit by unit; put weight normalization on with dim={axis}"
            + (", and without groups" if axis and getattr(layer, "groups", 1) > 1 else "")
        )


def _length_and_bias(layer: nn.Module) -> tuple[Tensor, ...]:
    length, bias = layer.get_parameter("parametrizations.weight.original0"), layer._parameters.get("bias")
    return (length,) if bias is None else (length, bias)


def _neutral(name: str, rows: dict[str, Change]) -> Callable[[nn.Module, Any], None]:
    """Before the first call: g is 1 and b is 0, so that the layer gives t."""

    def hook(layer: nn.Module, args: Any) -> None:
        if name not in rows:
            length, *bias = _length_and_bias(layer)
            length.fill_(1.0)
            for tensor in bias:
                tensor.zero_()

    return hook


def _normalize(name: str, rows: dict[str, Change]) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    """After it: set both, and hand the normalized t on."""

    def hook(layer: nn.Module, args: Any, t: Tensor) -> Tensor | None:
        if name in rows:
            return None
        length, *biases = _length_and_bias(layer)
        axis = t.dim() - 1 - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)
        wide = t.to(accumulation_dtype(t.dtype))
        found = moments(wide, [dim for dim in range(t.dim()) if dim != axis])
        std = found.var.sqrt()
        _refuse_constant(label(name), found.mean.flatten(), std.flatten(), t)
        scale = 1 / (std + _EPS)
        length.copy_(scale.view_as(length))
        shift = -found.mean * scale
        for bias in biases:
            bias.copy_(shift.flatten())
        low, high = std.min().item(), std.max().item()
        note = f"deviations were {low:.3g} to {high:.3g}" + ("" if biases else "; it has no bias: means stay")
        rows[name] = Change(label(name), _name(layer), "g and b set" if biases else "g set", note)
        return (wide * scale + (shift if biases else 0.0)).to(t.dtype)

    return hook


def _refuse_constant(name: str, mean: Tensor, std: Tensor, t: Tensor) -> None:
    # Of equal numbers that are no powers of two a deviation of a few roundings is left.
    rounding = 64 * torch.finfo(mean.dtype).eps * mean.abs()
    bad = ~(std > rounding) | ~std.isfinite()
    if bool(bad.any()):
        units = bad.nonzero().flatten().tolist()
        shown = ", ".join(map(str, units[:5])) + (" and others" if len(units) > 5 else "")
        raise SurgeryError(
            f"{name}: output units {shown} are constant or not finite on the batch (pre-activations {show(t.shape)}), so that no "
            "scale makes their variance 1; give a larger batch of different samples, or directions that are not zero"
        )


def _put_back(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)


def _name(layer: nn.Module) -> str:
    direction = layer.get_parameter("parametrizations.weight.original1")
    return f"{type(layer).__name__.removeprefix('Parametrized')} {show(direction.shape)}"
