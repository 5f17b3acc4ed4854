"""Residual blocks without norms, whose variance at the start of training is predicted."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normkit.core.errors import OptionError
from normkit.core.module import Module


class NormalizerFreeBlock(Module):
    """A residual block whose branch sees an input of unit variance: x + alpha f(x / beta).

    beta is the standard deviation of the input at the start of training; see ``predicted_betas``. The branch must keep a
    variance of 1, as layers with scaled weight standardization and scaled activations do. In a transition block, which
    changes width or resolution, the shortcut too takes x / beta, and the variance starts at 1 again.

    Args:
        branch: f, which maps unit variance to unit variance.
        beta: expected standard deviation of the input. Default: 1.
        alpha: weight of the branch. Default: 0.2.
        shortcut: the shortcut of a transition block, which takes x / beta. Default: None, the input itself.

    Shape: Any that the branch accepts.

    Raises:
        OptionError: beta or alpha is not above 0.

    Reference: Brock, De, Smith (2021), https://arxiv.org/abs/2101.08692, section 3.

    >>> NormalizerFreeBlock(nn.Identity(), beta=2.0, alpha=0.5)(torch.tensor([4.0]))
    tensor([5.])
    """

    shown = "beta={0.beta:.6g}, alpha={0.alpha:.6g}"

    def __init__(
        self, branch: nn.Module, beta: float = 1.0, alpha: float = 0.2, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not (beta > 0 and alpha > 0):
            raise OptionError(f"NormalizerFreeBlock: beta={beta}, alpha={alpha}; wanted numbers above 0")
        self.branch, self.shortcut, self.beta, self.alpha = branch, shortcut, beta, alpha

    def forward(self, input: Tensor) -> Tensor:
        """Add the weighted branch to the input."""
        scaled = input / self.beta
        return (input if self.shortcut is None else self.shortcut(scaled)) + self.alpha * self.branch(scaled)


def predicted_betas(transitions: Iterable[bool], alpha: float = 0.2) -> list[float]:
    """Predict the standard deviation of each block's input at the start, where each block may be a transition.

    The first input has variance 1. A block adds alpha^2; after a transition, whose shortcut has variance 1, it is 1 + alpha^2
    (Brock, De, Smith, 2021, https://arxiv.org/abs/2101.08692, section 3).

    >>> [round(beta**2, 2) for beta in predicted_betas([True, False, False, True, False])]
    [1.0, 1.04, 1.08, 1.12, 1.04]
    """
    betas, variance = [], 1.0
    for transition in transitions:
        betas.append(math.sqrt(variance))
        variance = (1.0 if transition else variance) + alpha**2
    return betas


def scaled_activation(activation: nn.Module, gamma: float) -> nn.Sequential:
    """Scale an activation to unit variance for a standard normal input; for layers whose weights do not include the factor.

    >>> scaled_activation(nn.ReLU(), 2.0)(torch.tensor([-1.0, 3.0]))
    tensor([0., 6.])
    """
    return nn.Sequential(activation, _Scale(gamma))


class _Scale(Module):
    shown = "{0.factor:.6g}"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        return torch.mul(input, self.factor)
