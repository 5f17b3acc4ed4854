"""How the signal lives through a model's depth: moments of every module's output and gradient, over streamed batches."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.errors import OptionError
from normkit.diagnostics.subject import Where, chosen, refuse_reentrant, target_of
from normkit.surgery.recalibrate import forward_batch
from normkit.surgery.watch import forked, tensors_in

_CHUNK = 1 << 20  # elements that are in float64 at a time
_NEAR = 0.01  # of the way between two bounds that counts as at a bound
_BOUNDS: dict[type[nn.Module], tuple[float, float]] = {
    **{kind: (-1.0, 1.0) for kind in (nn.Tanh, nn.Softsign, nn.Hardtanh)},
    **{kind: (0.0, 1.0) for kind in (nn.Sigmoid, nn.Hardsigmoid)},
    nn.ReLU6: (-6.0, 6.0),  # at 0 it rectifies, and at 6 alone it saturates
}


@dataclass(frozen=True)
class Signal:
    """What a module gave, over all batches."""

    name: str  # of the module
    kind: str  # its class
    # Of all elements, as are ``std`` and ``kurtosis``, the fourth central moment over squared variance: 3 if normal.
    mean: float
    std: float  # standard deviation
    kurtosis: float  # see above
    # Share of units that were always zero; a unit is a channel, axis 1 from four axes on, else the last axis.
    dead: float
    # Share of elements within 1 % of a bound of Tanh, Sigmoid and their like; None for other modules.
    saturated: float | None
    gradient_std: float | None  # standard deviation of the gradient of the loss by the output; None without a loss
    elements: int  # that were seen


class Stream:
    """The first four central moments of all elements that are added, in float64, merged part by part.

    Reference: Pebay (2008), https://doi.org/10.2172/1028931.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._m2, self._m3, self._m4 = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Takes elements in."""
        for part in x.detach().flatten().split(_CHUNK):
            part = part.cpu().double() if part.device.type == "mps" else part.double()
            if part.numel():
                apart = part - part.mean()
                square = apart.square()
                sums = torch.stack([part.mean(), square.sum(), (square * apart).sum(), square.square().sum()])
                self._merge(part.numel(), *sums.tolist())

    def _merge(self, b: int, mean: float, m2: float, m3: float, m4: float) -> None:
        a, d = self.count, mean - self.mean
        n = a + b
        self._m4 += m4 + d**4 * a * b * (a * a - a * b + b * b) / n**3 + 4 * d * (a * m3 - b * self._m3) / n
        self._m4 += 6 * d**2 * (a * a * m2 + b * b * self._m2) / n**2
        self._m3 += m3 + d**3 * a * b * (a - b) / n**2 + 3 * d * (a * m2 - b * self._m2) / n
        self._m2 += m2 + d**2 * a * b / n
        self.mean += d * b / n
        self.count = n

    @property
    def std(self) -> float:
        """Standard deviation, by all elements."""
        return (self._m2 / self.count) ** 0.5 if self.count else float("nan")

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over squared variance; NaN of a constant."""
        return self.count * self._m4 / self._m2**2 if self._m2 else float("nan")


def activations(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    where: Where | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[Signal]:
    """Measure mean, deviation, kurtosis, dead and saturated parts of every module's output, and the deviation of its gradient.

    Hooks stream each output into moments and keep nothing; a batch costs its forward pass (with a loss its backward pass) and a
    few passes over each output in float64. The model stays in its mode; running statistics, gradients and random generators are
    as before afterwards. Functions, such as ``F.relu``, are no modules, and not seen.

    Args:
        model: any module.
        batches: of inputs, as ``recalibrate`` takes them; with a loss, pairs of input and target.
        loss: ``loss(output, target)``; gradients scale with it, a mean over the batch having them smaller by the batch's size.
            Default: None, no backward pass.
        where: which modules, by name and module. Default: those without modules in them.
        forward: ``forward(model, batch)``, in place of giving the model the batch's input. Default: None.

    Returns a row per module whose output is, or begins with, a floating tensor, in the order of the first call.

    Raises:
        OptionError: there are no batches, a loss and a batch without a target, or reentrant checkpointing with a loss.

    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    >>> model[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> for row in activations(model, [torch.tensor([[1.0], [3.0]])]):
    ...     print(row.name, row.kind, row.mean, round(row.std, 3), row.dead)
    0 Linear 0.0 2.236 0.0
    1 ReLU 1.0 1.225 0.5
    """
    seen, count, names, passing = dict[nn.Module, _Seen](), 0, chosen(model, where), True

    def see(module: nn.Module, args: Any, output: Any) -> None:
        found = next(tensors_in(output), None)
        # Checkpointing calls modules again in the backward pass.
        if passing and found is not None and found.is_floating_point():
            seen.setdefault(module, _Seen(module)).see(found, loss is not None)

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with ExitStack() as stack, forked(), torch.set_grad_enabled(loss is not None):
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no hooks
        for module in names:
            stack.callback(module.register_forward_hook(see).remove)
        for buffer, value in buffers:
            stack.callback(buffer.data.copy_, value)
        for batch in batches:
            count, passing = count + 1, True
            output = (forward or forward_batch)(model, batch)
            passing = False
            if loss is not None:
                value = loss(output, target_of(batch, "activations"))
                refuse_reentrant(value, "activations")
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                torch.autograd.grad(value, trained, allow_unused=True)
    if not count:
        raise OptionError("activations: there are no batches; a generator can be walked only once, give a fresh one")
    return [found.row(names[module]) for module, found in seen.items()]


class _Seen:
    """What a module gave so far."""

    def __init__(self, module: nn.Module) -> None:
        self.kind, self.outputs, self.gradients = type(module).__name__, Stream(), Stream()
        self.bounds, self.saturated = _BOUNDS.get(type(module)), 0
        self.alive: Tensor | None = None

    def see(self, output: Tensor, backward: bool) -> None:
        """Take one call's output in."""
        x = output.detach()
        self.outputs.add(x)
        axis = 1 if x.dim() > 3 else x.dim() - 1
        alive = (x != 0).movedim(axis, 0).flatten(1).any(1) if x.dim() > 1 else x != 0
        known = self.alive is not None and self.alive.shape == alive.shape
        self.alive = self.alive | alive if known and self.alive is not None else alive
        if self.bounds is not None:
            low, high = self.bounds
            near = _NEAR * (high - low)
            self.saturated += int(((x < low + near) | (x > high - near)).sum())
        if backward and output.requires_grad:
            output.register_hook(self.gradients.add)

    def row(self, name: str) -> Signal:
        """All of it."""
        assert self.alive is not None
        of, dead = self.outputs, 1 - self.alive.double().mean().item()
        saturated = None if self.bounds is None else self.saturated / max(of.count, 1)
        gradient = self.gradients.std if self.gradients.count else None
        return Signal(name, self.kind, of.mean, of.std, of.kurtosis, dead, saturated, gradient, of.count)
