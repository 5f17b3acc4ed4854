"""The exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Average:
    """Follows a model's parameters, and the running statistics of its norms, and takes their place when it is judged.

        average <- decay * average + (1 - decay) * value

    What a weight parametrization keeps for itself, such as the vectors of spectral norm, and counters are not averaged.

    Args:
        model: the first average is its values.
        decay: a step, from 0 to below 1.

    Reference:
        Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging, https://doi.org/10.1137/0330046

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> average = Average(model, 0.75)
    >>> _ = nn.init.ones_(model.weight)
    >>> average.update()
    >>> with average.in_place():
    ...     print(model.weight.item())
    0.25
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
            self.values = {name: tensor.detach().clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's values."""
        for name, tensor in self.live.items():
            self.values[name].lerp_(tensor, 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the model, and the model's own values back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self.live.items():
            own = tensor.detach().clone()
            tensor.copy_(self.values[name])
            self.values[name].copy_(own)

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
