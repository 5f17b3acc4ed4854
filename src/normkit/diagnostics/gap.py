"""The gap between training and evaluation: each batch normalization's running statistics against those of its inputs."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.errors import OptionError
from normkit.diagnostics.subject import target_of
from normkit.surgery.recalibrate import forward_batch, recalibrate

_BUFFERS = ("running_mean", "running_var", "running_std")


@dataclass(frozen=True)
class LayerGap:
    """One layer's gap."""

    name: str  # of the layer
    # Root mean square difference of its normalized outputs under the two statistics, in their standard deviations:
    # per channel ((m - m') / s)^2 + (s' / s - 1)^2, with running mean and deviation m, s and those of the inputs m',
    # s'.
    distance: float
    worst: float  # the largest over channels; ``distance`` is the root mean square over them
    # How much the loss falls if this layer alone has the statistics of its inputs; None without a loss.
    loss: float | None = None
    accuracy: float | None = None  # how much the accuracy rises then, of class scores against classes; else None


class Gap(list[LayerGap]):
    """The gap of every layer; in evaluation the model has loss ``loss`` and accuracy ``accuracy``, where they were measured."""

    loss: float | None = None
    accuracy: float | None = None

    def __init__(self, model: nn.Module, found: dict[str, dict[str, Tensor]]) -> None:
        super().__init__()
        self._model, self._found = model, found

    def __str__(self) -> str:
        return "\n".join(f"{row.name or '(model)'}: {row.distance:.3g} (worst channel {row.worst:.3g})" for row in self)

    def recalibrate(self, beyond: float = 0.1) -> list[str]:
        """Put the statistics of their inputs into the layers whose distance is beyond a threshold; return their names."""
        chosen = [row.name for row in self if row.distance > beyond]
        for name in chosen:
            _write(_layer(self._model, name), self._found[name])
        return chosen


@torch.no_grad()
def gap(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    limit: int | None = 200,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Gap:
    """Measure how far running statistics are from those of the layers' inputs, and what each layer's gap costs.

    The statistics of the inputs are those of ``recalibrate``, on a copy, every batch normalization normalizing by its batch. With
    a loss, what a gap costs is measured in evaluation: one pass over the batches with the model as it is, and one per layer with
    that layer alone recalibrated. The model is not changed; ``.recalibrate(beyond)`` of the result does so.

    ``batches``, ``limit`` and ``forward`` are those of ``recalibrate``; with a ``loss(output, target)``, a mean over the batch,
    the batches are pairs, to be walked several times.

    Returns a row per layer, in the order of the modules, with what evaluation gives now.

    Raises:
        SurgeryError: the model has no such layer, there are no batches, or a layer is never called.
        OptionError: a loss, and batches that can be walked only once.

    >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    >>> found = gap(model, [torch.tensor([[2.0], [4.0]])])
    >>> round(found[0].distance, 3), found.recalibrate(), model[0].running_mean  # running mean 0, inputs' mean 3
    (3.0, ['0'], tensor([3.]))
    """
    if loss is not None and isinstance(batches, Iterator):
        raise OptionError("gap: a loss needs batches that can be walked several times; give a list, or a loader")
    twin = copy.deepcopy(model)
    changes = recalibrate(twin, batches, limit=limit, forward=forward)
    names = ["" if row.layer == "(model)" else row.layer for row in changes.rows]
    found = {name: _statistics(_layer(twin, name)) for name in names}
    twin, rows = copy.deepcopy(model).eval(), Gap(model, found)
    if loss is not None:
        rows.loss, rows.accuracy = _scores(twin, batches, loss, forward)
    for name in names:
        layer = _layer(twin, name)
        before, cost, gain = _statistics(layer), None, None
        eps = getattr(layer, "eps", 0.0)
        distance = distance_of(*_moments(before, eps), *_moments(found[name], eps))
        if loss is not None and rows.loss is not None:
            _write(layer, found[name])
            then, right = _scores(twin, batches, loss, forward)
            _write(layer, before)
            cost, gain = rows.loss - then, None if rows.accuracy is None or right is None else right - rows.accuracy
        rows.append(LayerGap(name, distance.square().mean().sqrt().item(), distance.max().item(), cost, gain))
    return rows


def distance_of(mean: Tensor, deviation: Tensor, real_mean: Tensor, real_deviation: Tensor) -> Tensor:
    """The distance of each channel, see ``LayerGap``."""
    return (((mean - real_mean) / deviation).square() + (real_deviation / deviation - 1).square()).sqrt()


def _moments(of: dict[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    mean = of["running_mean"].double()
    if "running_std" in of:
        return mean, of["running_std"].double()
    return mean, (of["running_var"].double() + eps).sqrt() if "running_var" in of else torch.ones_like(mean)


def _layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of a name, out of its wrapper if it is compiled."""
    layer = model.get_submodule(name)
    return getattr(layer, "_orig_mod", layer)


def _statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key in _BUFFERS if (value := layer._buffers.get(key)) is not None}


@torch.no_grad()
def _write(layer: nn.Module, values: dict[str, Tensor]) -> None:
    for key, value in values.items():
        layer.get_buffer(key).copy_(value)


def _scores(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    forward: Callable[[nn.Module, Any], Any] | None,
) -> tuple[float, float | None]:
    """Mean loss and accuracy over all batches; no accuracy where outputs are not scores of classes."""
    total, right, count, classes = 0.0, 0, 0, True
    for batch in batches:
        output, target = (forward or forward_batch)(model, batch), target_of(batch, "gap")
        total += loss(output, target).item() * len(target)
        count += len(target)
        classes = classes and output.dim() == 2 and target.dim() == 1 and not target.is_floating_point()
        right += int((output.argmax(1) == target).sum()) if classes else 0
    return total / count, right / count if classes else None
