"""Pixels held as bytes, standardized a channel when they are used: a quarter of the memory of floats."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Standardize:
    """y = (x / 255 - mean_c) / std_c, from bytes to float32."""

    mean: tuple[float, ...]  # of each channel, of pixels from 0 to 1
    std: tuple[float, ...]  # of each channel

    def __call__(self, x: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, dtype=torch.float32, device=x.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=x.device).view(-1, 1, 1)
        return (x / 255.0 - mean) / std

    @classmethod
    def of(cls, images: Tensor) -> "Standardize":
        """Measures mean and standard deviation over images."""
        # Counts of the 256 values say all of it exactly, and need no copy of the images in floats.
        values = torch.arange(256, dtype=torch.float64) / 255.0
        mean, std = [], []
        for channel in images.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean.append(float(share @ values))
            std.append(float((share @ (values - mean[-1]).square()).sqrt()))
        # A channel that never varies has deviation 0; it is left at 0 after its mean is taken away.
        return cls(tuple(mean), tuple(deviation or 1.0 for deviation in std))
