"""Classifiers of images in memory, for experiments with many short runs: data, batches, training and accuracy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.core.errors import OptionError
from normkit.lab.data.split import Split
from normkit.lab.seeding import epoch_order
from normkit.lab.sweep import Work
from normkit.lab.train.walk import Diverged, Walk, descend, device, walk

Images = tuple[Tensor, Tensor]
CHUNK = 500
VALIDATED = 500
LOOK_EVERY = 50  # steps between looks at the loss


@dataclass(frozen=True, kw_only=True)
class Size(Work):
    """How much is learned, by how wide a network."""

    data: str  # as of load, which `train`, `test` and `halve` are for too
    train: int | None  # as many images
    test: int | None  # likewise
    halve: bool  # average 2x2 pixels
    width: int  # channels of the network's first layer
    epochs: int  # passes over the training images

    def images(self) -> dict[str, Images]:
        return load(self.data, self.train, self.test, self.halve)


@lru_cache(maxsize=2)
def load(name: str, train: int | None = None, test: int | None = None, halve: bool = False) -> dict[str, Images]:
    """Reads images and labels into memory, standardized, without augmentation.

    CIFAR-10 is read from where ``NORMKIT_DATA`` says. Gives images (n, channels, height, width) and labels (n,) of
    ``"train"``, ``"val"`` (500 of CIFAR-10 where train is subsampled) and ``"test"``, on the accelerator if there is
    one; `halve` averages 2x2 pixels.
    """
    if name == "cifar10":
        from normkit.lab.data.cifar import cifar10

        data = cifar10(train=train, val=None if train is None else VALIDATED, test=test, augment=False)
    elif name == "digits":
        from normkit.lab.data.digits import digits

        data = digits()
    else:
        raise OptionError(f"images: there is no data set {name!r}; there are cifar10 and digits")
    found = {}
    for part, split, count in (("train", data.train, train), ("val", data.val, None), ("test", data.test, test)):
        x, y = (whole[:count].to(device()) for whole in _all(split))
        found[part] = (F.avg_pool2d(x, 2) if halve else x, y)
    return found


class Stream:
    """Training batches by their number, reshuffled for each epoch; what does not fill a batch is left out.

    ``order(epoch)`` gives the rows of an epoch, counted from 1, as many each time; by default a permutation drawn by
    the seed.
    """

    def __init__(self, images: Images, batch: int, seed: int, order: Callable[[int], Tensor] | None = None) -> None:
        self.images, self.batch = images, batch
        self.order = order or (lambda epoch: epoch_order(seed, epoch, len(images[0])))
        self._rows = 1, self.order(1)
        self.per_epoch = len(self._rows[1]) // batch

    def __call__(self, number: int) -> Images:
        epoch, place = divmod(number - 1, self.per_epoch)
        if self._rows[0] != epoch + 1:
            self._rows = epoch + 1, self.order(epoch + 1)
        rows = self._rows[1][place * self.batch : (place + 1) * self.batch]
        return self.images[0][rows], self.images[1][rows]


def fit(
    model: nn.Module,
    stream: Stream,
    epochs: int,
    rate: float,
    seed: int,
    folder: Path,
    before: Callable[[float], None] = lambda part: None,
    every: int | None = None,
) -> Walk:
    """Trains a classifier by SGD with momentum 0.9 and cosine decay of the rate, from its last checkpoint on.

    ``before(part)`` is called before each step with the part of the rate that is left. Rows are the mean loss over
    `every` steps, by default an epoch's.
    """
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    steps, losses = epochs * stream.per_epoch, Tally(stream.images[0].device)
    every = every or stream.per_epoch
    model.train()

    def step(number: int) -> dict[str, float] | None:
        part = 0.5 * (1 + math.cos(math.pi * (number - 1) / steps))
        before(part)
        for group in optimizer.param_groups:
            group["lr"] = rate * part
        x, y = stream(number)
        loss = F.cross_entropy(model(x), y)
        descend(optimizer, loss)
        losses.total += loss.detach().double()
        if number % every and number % LOOK_EVERY:
            return None
        if not torch.isfinite(losses.total):
            raise Diverged
        return None if number % every else {"loss": losses.empty() / every}

    return walk(folder, steps, {"model": model, "optimizer": optimizer, "losses": losses}, step, seed)


class Tally(nn.Module):
    """A sum that is part of a checkpoint."""

    total: Tensor

    def __init__(self, where: torch.device) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64, device=where))

    def empty(self) -> float:
        total = self.total.item()
        self.total.zero_()
        return total


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch: int = CHUNK) -> float:
    """The share of images whose class a model finds, in the mode it is in, in batches of that size, in their order."""
    pairs = zip(*(part.split(batch) for part in images), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(images[0])


def _all(split: Split) -> Images:
    parts = [split.batch(rows, torch.device("cpu")) for rows in torch.arange(len(split)).split(CHUNK)]
    inputs = [part for part, _ in parts if isinstance(part, Tensor)]
    return torch.cat(inputs), torch.cat([labels for _, labels in parts])
