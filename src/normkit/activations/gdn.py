"""Generalized divisive normalization: divide each channel by a learned pool of all channels' energies; and its inverse."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype, full_precision
from normkit.core.support import check_shape
from normkit.engine.layer import check_channels, check_channels_first

# Entries of gamma that should be 0 start here instead: a square has no slope at 0, and would never leave it.
_START = 2.0**-18


class GDN(Module):
    """Divide each channel by the root of a learned weighted sum of all channels' energies at the same position.

    y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2); with ``inverse`` x is multiplied by the root instead, as in decoders. Both
    stay positive because the parameters are roots: beta = ``beta``^2 + beta_min and gamma = ``gamma``^2. The same in training and
    evaluation.

    Args:
        num_channels: channels C.
        inverse: whether to multiply (IGDN). Default: False.
        beta_min: the least beta, above 0. Default: 1e-6.
        gamma_init: initial diagonal of gamma; beta starts at 1. Default: 0.1.

    Shape: (N, C, *); the output has the same shape.

    Raises:
        ShapeError: a number of channels other than ``num_channels``.
        OptionError: beta_min is not between 0 and 1, or gamma_init is negative.

    Reference: Ballé, Laparra, Simoncelli (2016), https://arxiv.org/abs/1511.06281.

    >>> GDN(2)(torch.tensor([[3.0, 0.0]])).detach()
    tensor([[2.1764, 0.0000]])
    """

    shown = "{0.num_channels}, inverse={0.inverse}, beta_min={0.beta_min}"

    def __init__(
        self,
        num_channels: int,
        inverse: bool = False,
        beta_min: float = 1e-6,
        gamma_init: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not (0 < beta_min < 1 and gamma_init >= 0):
            raise OptionError(f"GDN: beta_min={beta_min}, gamma_init={gamma_init}; wanted between 0 and 1, and from 0")
        self.num_channels, self.inverse = num_channels, inverse
        self.beta_min, self.gamma_init = beta_min, gamma_init
        self.beta = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.gamma = nn.Parameter(torch.empty(num_channels, num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.beta, (1 - self.beta_min) ** 0.5)
        nn.init.constant_(self.gamma, _START)
        with torch.no_grad():
            self.gamma.diagonal().fill_(max(self.gamma_init**0.5, _START))

    def forward(self, input: Tensor) -> Tensor:
        check_channels("GDN", input, self.num_channels, "num_channels", "n c *")
        wide = accumulation_dtype(input.dtype)
        beta = self.beta.to(wide).square() + self.beta_min
        return gdn(input, beta, self.gamma.to(wide).square(), inverse=self.inverse)


def gdn(input: Tensor, beta: Tensor, gamma: Tensor, *, inverse: bool = False) -> Tensor:
    """Generalized divisive normalization with beta > 0 of shape (C,) and gamma >= 0 of shape (C, C); see GDN.

    >>> gdn(torch.tensor([[3.0, 0.0]]), torch.ones(2), torch.eye(2) / 3)
    tensor([[1.5000, 0.0000]])
    """
    wide = input.to(accumulation_dtype(input.dtype))
    check_channels_first("gdn", input)
    channels = input.shape[1]
    check_shape("gdn", "beta", beta, channels)
    check_shape("gdn", "gamma", gamma, channels, channels)
    with full_precision(input):
        energy = F.linear(wide.square().movedim(1, -1), gamma.to(wide.dtype), beta.to(wide.dtype)).movedim(-1, 1)
    return (wide * (energy.sqrt() if inverse else energy.rsqrt())).to(input.dtype)


def _card(inverse: bool) -> Card:
    return Card(
        name="igdn" if inverse else "gdn",
        title=f"{'Inverse generalized' if inverse else 'Generalized'} divisive normalization",
        word="" if inverse else "gdn",
        wordless="it undoes gdn, and amplifies where a norm divides" if inverse else "",
        normalized_over="each position, over a learned pool of its channels, without centring",
        formula=f"y_i = x_i {'*' if inverse else '/'} sqrt(beta_i + sum_j gamma_ij x_j^2)",
        paper=paper("ballé2016density"),
        use_cases=f"learned image compression: the nonlinearity of the {'decoder' if inverse else 'encoder'}",
        strengths="makes the channels of natural images nearly independent and Gaussian; does not depend on the batch",
        weaknesses="C^2 weights and a matrix product per position; does not fix the scale of activations",
        module=GDN,
        functional=gdn,
        make=lambda channels: GDN(channels, inverse),
        build=None if inverse else lambda at: GDN(at.channels, **at.factory),
        takes=(),
        over="c",
        accompanies=True,
        fits=lambda module: module.inverse == inverse,
    )


CARD = _card(inverse=False)
CARD_INVERSE = _card(inverse=True)
