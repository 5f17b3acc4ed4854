"""The exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Average:
    """Follows a model's parameters, and the running statistics of its norms, and takes their place when it is judged.

        average <- d * average + (1 - d) * value,   d = min(decay, (1 + n) / (10 + n)) at step n

    The smaller decay of the first steps lets the average forget the initial weights, of which a run of few steps would
    otherwise keep most. Averages are held in single precision at least: in half of it, steps of a thousandth round to none.

    What a weight parametrization keeps for itself, such as the vectors of spectral norm, and counters are not averaged.

    Reference:
        Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging, https://doi.org/10.1137/0330046;
        the decay of the first steps is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live: dict[str, Tensor] = dict(model.named_parameters())
        self.live |= {
            name: buffer
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() and "parametrizations." not in name
        }
        with torch.no_grad():
            self.values = {
                name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
                for name, tensor in self.live.items()
            }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the model's values."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.live.items():
            value = self.values[name]
            value.lerp_(tensor.to(value.dtype), 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the model, and the model's own values back at the end."""
        own = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self.live.items():
            tensor.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """Gives the average, whole where it is sharded. Every process must ask for it."""
        return {
            name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in self.values.items()
        }

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state` gave."""
        for name, value in self.values.items():
            given = values[name].to(value.device)
            if isinstance(value, DTensor):
                given = distribute_tensor(given, value.device_mesh, value.placements)
            value.copy_(given)
