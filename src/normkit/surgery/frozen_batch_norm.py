"""Batch normalization by statistics that never change, as detectors have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normkit.activations.batch_norm import batch_norm
from normkit.engine.call import Activation
from normkit.engine.reference import activate


class FrozenBatchNorm(nn.Module):
    """Normalize each channel by fixed statistics, in training and evaluation alike; nothing in it is trained.

    y = weight * (x - running_mean) / sqrt(running_var + eps) + bias. All four are buffers, with the keys of the detectors'
    FrozenBatchNorm2d; the count of a BatchNorm's checkpoint is dropped on loading.

    Args:
        num_features: channels C.
        eps: added to the variance. Default: 1e-5.
        layout: ``"n c *"`` or ``"n * c"``. Default: "n c *".
        activation: what follows: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or None. Default: None.
        device: of the buffers.
        dtype: of the buffers.

    Shape:
        (N, C, *), or (N, *, C) by ``layout``, to the same.

    >>> FrozenBatchNorm(1, eps=0.0)(torch.tensor([[2.0]]))
    tensor([[2.]])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        layout: str = "n c *",
        activation: Activation | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.layout, self.activation = num_features, eps, layout, activation
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize."""
        mean, var, weight, bias = (self.get_buffer(k) for k in ("running_mean", "running_var", "weight", "bias"))
        y = batch_norm(input, mean, var, weight, bias, eps=self.eps, layout=self.layout)
        return activate(y, self.activation)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}" + ("" if self.layout == "n c *" else f", layout={self.layout!r}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
