"""Norms of a claim on covariate shift: none but a bias, batch normalization, and that with noise behind it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normkit.activations.batch_norm import BatchNorm

MEAN, DEVIATION, JITTER = 0.5, 1.25, 0.1


class Shift(nn.Module):
    """A bias for each channel of (N, C, *), which stands in for a norm that is left out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(-1, *[1] * (x.dim() - 2))


class NoisyBatchNorm(nn.Module):
    """Batch normalization, and in training noise behind it whose mean and deviation are redrawn at every call.

    y = s * BN(x) + m. A channel's mean is within 0.5 of 0 and its deviation from 1 to 1.25; m is within 0.1 of the mean, and s
    normal about the deviation with deviation 0.1, both for each sample and channel.

    Reference:
        Santurkar et al. 2018, How Does Batch Normalization Help Optimization?, https://arxiv.org/abs/1805.11604, appendix A
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if not self.training:
            return y
        size = x.shape[:2]
        means = (2 * torch.rand(1, size[1], device=x.device) - 1) * MEAN
        deviations = 1 + (DEVIATION - 1) * torch.rand(1, size[1], device=x.device)
        m = means + (2 * torch.rand(size, device=x.device) - 1) * JITTER
        s = deviations + torch.randn(size, device=x.device) * JITTER
        shape = [*size, *[1] * (x.dim() - 2)]
        return s.view(shape) * y + m.view(shape)


MAKERS: dict[str, Callable[[int], nn.Module]] = {"none": Shift, "bn": BatchNorm, "noisy": NoisyBatchNorm}
