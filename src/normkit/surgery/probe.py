"""Finds out what an unknown norm computes by running it on random inputs."""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BIAS_NAMES = ("bias", "beta", "shift", "b")
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)
# The formulas differ by percents where they differ; classes that compute in float32 agree to about 1e-6.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Found:
    """What an unknown norm was seen to compute.

    Args:
        kind: ``"layer_norm"`` or ``"rms_norm"``.
        over: the axes of ``"n c *"`` over which it normalizes, or "" for the last axis.
        offset: 1 where the gain is 1 + weight, else 0.
        eps: inside the root.
        weight: the name of its gain, or "".
        bias: the name of its bias, or "".
        shape: how many features it has; empty if it takes any number.
    """

    kind: str
    over: str
    offset: int
    eps: float
    weight: str
    bias: str
    shape: tuple[int, ...] = ()


def probe(module: nn.Module) -> Found | str:
    """Compare a module with the formulas of layer and RMS normalization, on inputs of size 1 and of size 1e-3.

    The small input tells eps apart. The module is not changed and its hooks don't run: a stand-in of the same class with
    random parameters is run in its place.

    Args:
        module: without children, whose only parameters are a weight and perhaps a bias of one axis, or which has none.

    Returns:
        The formula that fits, or the reason why none does.
    """
    own = dict(module.named_parameters(recurse=False))
    bias = next((name for name in own if name in _BIAS_NAMES), "") if len(own) == 2 else ""
    weight = next((name for name in own if name != bias), "")
    shapes = {tuple(parameter.shape) for parameter in own.values()} or {_declared(module)}
    other = (
        len(own) > 1 + bool(bias) or len(shapes) > 1 or any(len(shape) > 1 or (own and not shape) for shape in shapes)
    )
    if other or (not own and next(module.buffers(), None) is not None):
        return f"its parameters ({', '.join(own) or 'none'}) are not one weight and at most one bias, of one axis"
    (shape,) = shapes
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(arguments) != 1:
        return f"its forward takes {', '.join(arguments) or 'nothing'}; a norm takes its input alone"
    generator = torch.Generator().manual_seed(0)
    channels, device = shape[0] if shape else 8, own[weight].device if own else torch.device("cpu")

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    double = _stand_in(module, {name: random(channels) for name in own})
    gain, shift = (double._parameters[name] if name else None for name in (weight, bias))
    numbers = {value: None for value in vars(module).values() if isinstance(value, float) and 0 <= value < 1}
    for sizes, axis in _inputs(channels):
        x = random(*sizes) + 0.5
        seen = [_run(double, x * size) for size in (1.0, 1e-3)]
        if any(y is None or y.shape != x.shape for y in seen):
            continue
        overs = [""] if axis == -1 else ["c", "c *"]
        tried = itertools.product(("layer_norm", "rms_norm"), overs, (0, 1) if own else (0,), (*numbers, *_USUAL_EPS))
        for kind, over, offset, eps in tried:
            dims = tuple(range(1, len(sizes))) if over == "c *" else (axis,)
            scale = None if gain is None else gain + offset
            if all(
                y is not None and _close(y, _formula(x * size, kind, dims, axis, eps, scale, shift))
                for y, size in zip(seen, (1.0, 1e-3), strict=True)
            ):
                return Found(kind, over, offset, float(eps), weight, bias, shape)
    return "it fits neither layer normalization nor RMS normalization with gain weight or 1 + weight"


def _declared(module: nn.Module) -> tuple[int, ...]:
    """How many features a module without parameters says that it has; empty if it does not say."""
    size = getattr(module, "normalized_shape", ())
    return (size,) if isinstance(size, int) else tuple(size)


def _inputs(channels: int) -> list[tuple[tuple[int, ...], int]]:
    """Shapes to try, each with its channel axis; positions are never as many as channels."""
    a, b = (3 if channels != 3 else 5), (4 if channels != 4 else 6)
    return [
        ((2, a, channels), -1),
        ((2, a, b, channels), -1),
        ((2, channels, a, b), 1),
        ((2, channels, a), 1),
        ((2, channels, a, b, 2), 1),
    ]


def _stand_in(module: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    double = object.__new__(type(module))
    vars(double).update(vars(module))
    vars(double).update(
        _parameters={name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    )
    vars(double).update({name: OrderedDict() for name in vars(module) if name.endswith("_hooks")})
    return double


def _run(double: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            y = double(x)
    except Exception:  # a shape that the class does not take: any error may say so
        return None
    return y if isinstance(y, Tensor) else None


def _formula(
    x: Tensor, kind: str, dims: tuple[int, ...], axis: int, eps: float, gain: Tensor | None, shift: Tensor | None
) -> Tensor:
    centred = x - x.mean(dims, keepdim=True) if kind == "layer_norm" else x
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    shape = [-1 if d == axis % x.dim() else 1 for d in range(x.dim())]
    y = y if gain is None else y * gain.view(shape)
    return y if shift is None else y + shift.view(shape)


def _close(y: Tensor, wanted: Tensor) -> bool:
    return bool((y.float() - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
