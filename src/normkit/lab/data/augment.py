"""What is done to images on the device where they are: bytes are standardized, whole batches flipped and cropped."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from normkit.core.errors import OptionError

TRIES = 10


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


@dataclass(frozen=True)
class FlipAndCrop:
    """Flips each image at random, cuts a random rectangle out of it and resizes that to the full size, bilinearly.

    The rectangle's area is uniform in `scale` times the image's, its width / height log-uniform in `ratio` times the image's,
    redrawn until it fits; its place is uniform (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6).
    """

    scale: tuple[float, float] = (0.8, 1.0)  # least and greatest part of the area
    ratio: tuple[float, float] = (0.9, 1.1)  # least and greatest change of width / height
    flip: float = 0.5  # probability that left and right change places

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise OptionError(f"scale is {self.scale}; wanted two parts of the area, above 0 and up to 1")
        if not 0 < self.ratio[0] <= 1 <= self.ratio[1] < math.inf:
            raise OptionError(f"ratio is {self.ratio}; wanted one up to 1 and one from 1")
        if not 0 <= self.flip <= 1:
            raise OptionError(f"flip is {self.flip}; wanted a probability")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augments a batch; the generator is on the CPU or on the images' device."""
        high, wide = x.shape[-2:]
        top, left, height, width, flipped = self.draw(len(x), high, wide, generator)
        rows = _places(top, height, high).to(x.device)
        columns = _places(left, width, wide)
        columns = torch.where(flipped[:, None], columns.flip(1), columns).to(x.device)
        # grid_sample counts from -1 at the left edge of the first pixel to 1 at the right edge of the last.
        y, x_axis = (2 * rows + 1) / high - 1, (2 * columns + 1) / wide - 1
        grid = torch.stack(torch.broadcast_tensors(x_axis[:, None, :], y[:, :, None]), dim=-1)
        return functional.grid_sample(x, grid.to(x.dtype), padding_mode="border", align_corners=False)

    def draw(self, count: int, high: int, wide: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draws top, left, height, width in pixels, and whether to flip; each ``(count,)`` on the generator's device."""
        drawn = torch.rand(3, count, TRIES, generator=generator, device=generator.device)
        area = (self.scale[0] + drawn[0] * (self.scale[1] - self.scale[0])) * high * wide
        low, ends = math.log(self.ratio[0]), math.log(self.ratio[1] / self.ratio[0])
        ratio = torch.exp(low + drawn[1] * ends) * wide / high
        width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (width <= wide) & (height <= high) & (width >= 1) & (height >= 1)
        first = fits.int().argmax(1, keepdim=True)
        # Where none of the tries fits, the whole image is taken.
        some = fits.any(1)
        width = torch.where(some, width.gather(1, first)[:, 0], wide)
        height = torch.where(some, height.gather(1, first)[:, 0], high)
        place = drawn[2, :, :3]
        top, left = (place[:, 0] * (high - height + 1)).floor(), (place[:, 1] * (wide - width + 1)).floor()
        return top, left, height, width, place[:, 2] < self.flip


def _places(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where `size` pixels, spread evenly over each rectangle, lie in the image; never beyond the rectangle's own pixels."""
    centre = (torch.arange(size, device=start.device) + 0.5) * (length[:, None] / size) - 0.5
    return start[:, None] + torch.minimum(centre.clamp(min=0), length[:, None] - 1)
