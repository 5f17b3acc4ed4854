"""The gain of a norm as one plus a parameter."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.weights.attachment import attach


class FromOne(nn.Module):
    """The parametrization gain = 1 + d, whose decay pulls the gain towards 1.

    >>> FromOne()(torch.tensor([0.5]))
    tensor([1.5000])
    """

    def forward(self, difference: Tensor) -> Tensor:
        """The gain."""
        return 1 + difference

    def right_inverse(self, gain: Tensor) -> Tensor:
        """What is kept of a gain: its difference from 1."""
        return gain - 1


def count_from_one(norm: nn.Module, weight: nn.Parameter) -> None:
    """Make a norm's gain 1 + a parameter, the very object; checkpoints that know it as ``weight`` load."""
    value = weight.data
    norm.register_parameter("weight", weight)
    attach(norm, "weight", FromOne())
    weight.data = value  # attaching took 1 off it
    norm.register_load_state_dict_pre_hook(_from_weight)


def loads_difference(norm: nn.Module) -> bool:
    """Whether plain checkpoints hold the difference as ``weight``, as ``count_from_one`` made the norm."""
    hooks = norm._load_state_dict_pre_hooks.values()
    return any(getattr(hook, "hook", hook) is _from_weight for hook in hooks)


def _from_weight(norm: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    if parametrize.is_parametrized(norm) and f"{prefix}weight" in state:
        state[f"{prefix}parametrizations.weight.original"] = state.pop(f"{prefix}weight")
