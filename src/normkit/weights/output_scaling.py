"""The product of a row-scaled weight with an input, computed without that weight: (E W) x = E (W x).

Scaling the output costs a pass over the output, rebuilding the weight one over the weight; both give the same values and
the same gradients. The layer's ``forward`` chooses at each call.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.errors import BackendError
from normkit.core.moments import accumulation_dtype
from normkit.weights.attachment import hooked
from normkit.weights.parametrization import Parametrization

Path = Literal["auto", "weight", "output"]

# Scaling the output wins where a weight has at least this many elements for each element of the output. Measured by
# benchmarks/conditioning.py on one core of a Xeon with AVX-512, torch 2.13, float32, as multiples of the plain layer's time.
# In training a kernel rebuilds the weight in one pass each way, while scaling makes the raw weight's gradient a sum of two
# tensors of its size: rebuilding wins below (at 16: Linear 4096x1024 1.19 against 1.24, at 2: 1.04 against 1.11), both are equal
# at 64 (Linear 1024x1024 1.59 and 1.58, 1000x2048 1.39 and 1.40). Without a kernel rebuilding has more passes: equal at 2. In
# inference scaling spares writing the weight: equal at 2 (1.06 both), at 16 1.27 against 1.15.
_TRAINING_KERNEL, _TRAINING, _INFERENCE = 64, 2, 2
_LEAST = min(_TRAINING_KERNEL, _TRAINING, _INFERENCE)

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RowScaling(Parametrization):
    """A parametrization that may be one factor per output unit.

    ``path`` says how the product is computed: ``"auto"``, ``"weight"`` or ``"output"``.
    """

    path: Path = "auto"

    def row_factors(self, weight: Tensor) -> Tensor | None:
        """The factor of each output unit, in at least float32; None where the parametrization is not of this form."""
        raise NotImplementedError


def refusal(layer: nn.Module, name: str = "weight") -> str | None:
    """Reason this layer's output can't be scaled instead of its weight, or None."""
    cls = parametrize.type_before_parametrizations(layer)
    kind = next((kind for kind in _PLAIN if isinstance(layer, kind)), None)
    if kind is None or name != "weight":
        return f"only the weight of a Linear, Conv1d, Conv2d or Conv3d can, and this is the {name} of {cls.__name__}"
    if any(getattr(cls, method, None) is not getattr(kind, method, None) for method in ("forward", "_conv_forward")):
        return f"{cls.__name__} computes its output differently from {kind.__name__}"
    return "the weight has another parametrization" if parametrize.is_parametrized(layer, name) else None


def scaled_forward(layer: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    """A ``forward`` for a layer that ``refusal`` lets pass: as the layer's own, and by whichever way is cheaper."""
    plain = parametrize.type_before_parametrizations(layer).forward

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        scaling = _scaling(self)
        if scaling is None:
            return plain(self, input)
        raw = self.parametrizations.weight.original  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(raw, Tensor)
        if scaling.path == "weight" or (scaling.path == "auto" and not _output_is_cheaper(self, scaling, raw, input)):
            return plain(self, input)
        factors = scaling.row_factors(raw)
        if factors is None:
            return plain(self, input)
        return _scaled(_product(self, raw, input), factors, self.bias, raw.dim() - 2)  # pyright: ignore[reportArgumentType]

    return forward


def _scaling(layer: nn.Module) -> RowScaling | None:
    """The weight's parametrization if it is a row scaling, the only one, and has no hooks."""
    found = layer._modules.get("parametrizations")
    if found is None or "weight" not in found._modules:
        return None
    held = found._modules["weight"]
    assert held is not None
    several = list(held._modules.values())
    if len(several) == 1 and isinstance(several[0], RowScaling):
        return None if hooked(held, several[0]) else several[0]
    if any(isinstance(part, RowScaling) and part.path == "output" for part in several):
        names = ", ".join(type(part).__name__ for part in several)
        raise BackendError(f'path="output": the weight has more than one parametrization ({names}); use path="auto"')
    return None


def _output_is_cheaper(layer: nn.Module, scaling: RowScaling, raw: Tensor, input: Tensor) -> bool:
    """Whether the output has few elements compared with the weight."""
    positions = input.numel() // max(raw.shape[1], 1)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        positions //= layer.groups * math.prod(layer.stride)
    if positions * _LEAST * raw.shape[0] > raw.numel():  # the most frequent case, decided at once
        return False
    if parametrize._cache_enabled:  # the weight is built once for many calls
        return False
    # W x is unbounded where W's rows are, and float16 overflows at 65504.
    device = input.device.type
    amp = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
    if torch.float16 in (raw.dtype, input.dtype, amp):
        return False
    trains = raw.requires_grad and torch.is_grad_enabled()
    crossing = (_TRAINING_KERNEL if scaling.share(raw) is not None else _TRAINING) if trains else _INFERENCE
    return positions * crossing * raw.shape[0] <= raw.numel()


def _product(layer: nn.Module, raw: Tensor, input: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(input, raw)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return layer._conv_forward(input, raw, None)


def _scaled(y: Tensor, factors: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """E y + b in the accumulation dtype, rounded to y's once."""
    wide = accumulation_dtype(y.dtype)
    shape = (-1, *[1] * spatial)
    factors = factors.to(wide).view(shape)
    if bias is None:
        return (y.to(wide) * factors).to(y.dtype)
    return torch.addcmul(bias.to(wide).view(shape), y.to(wide), factors).to(y.dtype)
