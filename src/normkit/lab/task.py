"""Losses and scores by the kind of targets: class indices (integers), labels that are yes or no (booleans), numbers (floats)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.core.errors import ProtocolError
from normkit.lab.data.batch import IGNORED, Inputs, kind

AMONG = 5


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Calls a model with a tensor, with a tuple as arguments, or with a dict as keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def predictions(output: Any, name: str = "model") -> Tensor:
    """Finds the predictions in what a model returned: a tensor, an object with ``.logits`` or a mapping with ``"logits"``.

    >>> predictions({"logits": torch.ones(2)})
    tensor([1., 1.])
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ProtocolError(
            f"model {name} returned {kind(output)}; "
            'wanted a tensor of logits, an object with .logits or a dict with "logits"'
        )
    return found


def loss(output: Any, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Averages cross-entropy over targets that are not ignored, binary cross-entropy over booleans, squared error over floats."""
    predicted = predictions(output).float()
    if targets.dtype == torch.bool:
        wanted = targets * (1 - smoothing) + smoothing / 2
        return functional.binary_cross_entropy_with_logits(predicted.reshape(targets.shape), wanted)
    if targets.is_floating_point():
        return functional.mse_loss(predicted.reshape(targets.shape), targets.float())
    how = {"ignore_index": IGNORED, "reduction": "sum", "label_smoothing": smoothing}
    total = functional.cross_entropy(predicted.flatten(0, -2), targets.flatten(), **how)
    # A batch of padding alone has loss 0, not 0 / 0.
    return total / (targets != IGNORED).sum().clamp(min=1)


def weight(targets: Tensor) -> Tensor:
    """Counts the targets over which :func:`loss` averages; 0 for a batch of padding alone."""
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return torch.tensor(targets.numel(), device=targets.device)
    return (targets != IGNORED).sum()


def tally(output: Any, targets: Tensor) -> Tensor:
    """Counts a batch: summed loss, summed right answers (or squared error), number of targets, right among five; float64.

    The last is 0 where there are no more than five classes, or a class per token.
    """
    total = marks(output, targets).sum()
    if targets.is_floating_point():
        return torch.stack([total, total, torch.full_like(total, targets.numel()), torch.zeros_like(total)])
    count, five = weight(targets).double(), torch.zeros_like(total)
    logits = predictions(output)
    if targets.ndim == 1 and logits.shape[-1] > AMONG:
        five = (logits.topk(AMONG).indices == targets[:, None]).any(1).sum().double()
    return torch.stack([loss(output, targets).double() * count, total, count, five])


def marks(output: Any, targets: Tensor) -> Tensor:
    """Gives what each sample of a batch adds to the score: its right answers, or its squared error; ``(n,)``, float64."""
    predicted = predictions(output)
    if targets.is_floating_point():
        found = (predicted.double().reshape(targets.shape) - targets.double()).square()
    elif targets.dtype == torch.bool:
        found = (predicted.reshape(targets.shape) > 0) == targets
    else:
        found = (predicted.argmax(-1) == targets) & (targets != IGNORED)
    return found.double().flatten(1).sum(1) if found.ndim > 1 else found.double()


def sizes(targets: Tensor) -> Tensor:
    """Gives what each sample adds to that by which a score divides: its targets, or their squared distance from the mean."""
    if targets.is_floating_point():
        found = (targets.double() - targets.double().mean(0)).square()
    else:
        found = torch.ones_like(targets) if targets.dtype == torch.bool else targets != IGNORED
    return found.double().flatten(1).sum(1) if found.ndim > 1 else found.double()


def score(sums: Tensor, targets: Tensor) -> tuple[float, float]:
    """Turns the sums of :func:`tally` over a whole split into a mean loss and a score: accuracy or R².

    R² = 1 - sum (y - p)^2 / sum (y - mean y)^2, the mean taken per column.
    """
    total, second, count, _ = sums.tolist()
    if targets.is_floating_point():
        return total / count, 1.0 - second / float(sizes(targets).sum())
    return total / count, second / count


def among_five(sums: Tensor) -> float | None:
    """The part of targets among a model's first five classes, by the sums of :func:`tally`; None where that says nothing."""
    return float(sums[3] / sums[2]) if sums[3] > 0 else None
