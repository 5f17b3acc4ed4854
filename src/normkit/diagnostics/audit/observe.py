"""One forward and one backward pass under hooks, which keep numbers and no activations."""

from __future__ import annotations

import inspect
import math
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from normkit.catalogue.citation import card_of
from normkit.core.errors import OptionError, SurgeryError
from normkit.core.support import Support
from normkit.diagnostics.audit.attention import Logits
from normkit.engine.layer import Layer
from normkit.surgery.changes import label
from normkit.surgery.norms import Norm, is_norm, reach, read_norm
from normkit.surgery.transaction import Transaction
from normkit.surgery.watch import forked, run_on, tensors_in

Run = Callable[[], Any]
_WITHOUT_CENTRING = ("rms", "scale", "response", "divisive", "frozen")


@dataclass
class Call:
    """What one call of a norm was given, in numbers.

    Args:
        shape: of its input.
        dtype: likewise.
        training: the mode in which it ran.
        elements: that share one statistic; None where that is not known.
        offset: the largest |mean| / std of a set that varies; 0 where the norm does not subtract a mean.
        beyond: the share of sets whose offset is beyond what the dtype resolves.
        mean: of each channel, where statistics reach over the batch; else None.
        var: likewise.
        samples: of the batch.
        effective: independent samples that would estimate the mean of a channel as well, in the median over channels.
        moved: bytes that were written in another memory layout than they came in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    training: bool
    elements: int | None = None
    offset: float = 0.0
    beyond: float = 0.0
    mean: Tensor | None = None
    var: Tensor | None = None
    samples: int = 0
    effective: float = math.inf
    moved: int = 0


@dataclass
class Seen:
    """A norm, and what was seen of it.

    Args:
        name: of the module.
        module: recognized by class, or by what it computes.
        norm: it as data; None where it can't be read.
        support: which elements share a statistic; None where that is not one rule.
        over_batch: whether statistics reach over samples in training.
        training: its mode before the audit.
        calls: of the forward pass.
        again: calls during the backward pass, as checkpointing makes them.
        layer: name and module of the Linear or convolution whose very output it read last.
        cancelled: the largest |sum of the gradient| / sum of |gradient| of a channel of that output; 0 where a norm cancels
            what is added to the channel. None where there is no gradient.
        gradient: root mean square of the gradient of each channel of its output, or None.
        rows: elements per channel behind ``gradient``.
    """

    name: str
    module: nn.Module
    norm: Norm | None
    support: Support | None
    over_batch: bool
    training: bool
    calls: list[Call] = field(default_factory=list)
    again: int = 0
    layer: tuple[str, nn.Module] | None = None
    cancelled: float | None = None
    gradient: Tensor | None = None
    rows: int = 0

    @property
    def label(self) -> str:
        """The name in findings."""
        return label(self.name)

    @property
    def channel(self) -> int:
        """The axis of channels."""
        return 1 if self.norm is not None and self.norm.axes == "n c *" else -1


@dataclass
class Observed:
    """A model, and all that checks look at.

    Args:
        model: put back as it was.
        batch: as it was given.
        optimizer: as it was given, or None.
        run: runs the model on the batch.
        example: the batch as surgery takes it; None where ``forward=`` reads it in a way of its own.
        norms: in the order of ``named_modules``.
        attention: by module, the largest logit and the entropy of its weights relative to uniform ones.
        notes: what could not be looked at.
    """

    model: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer | None
    run: Run
    example: Any
    norms: list[Seen]
    attention: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def prepare(
    model: nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer | None,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> Observed:
    """Recognize the norms of a model, and how it takes a batch."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise OptionError(f"audit: {name} has no size yet; run the model once on an example first")
    example = batch
    if isinstance(batch, list | tuple):
        wrapped = getattr(model, "_orig_mod", model)  # compiled
        wrapped = getattr(wrapped, "module", wrapped)  # parallel
        try:
            inspect.signature(wrapped.forward).bind(*batch)
        except TypeError:  # (inputs, targets), as a loader gives them
            example = batch[0]
    run = partial(forward, model, batch) if forward is not None else partial(run_on, model, example)
    norms = [
        _recognized(name, module)
        for name, module in model.named_modules()
        if "parametrizations" not in name.split(".") and is_norm(module)
    ]
    return Observed(model, batch, optimizer, run, None if forward is not None else example, norms)


def observe(seen: Observed, loss: Callable[[Any, Any], Tensor] | None) -> None:
    """Run a model forward and backward in training mode, without dropout, and note what its norms are given.

    A norm may refuse a set of one element; then the forward pass is made in evaluation, and there is no backward pass.

    Args:
        seen: what ``prepare`` gave; filled in. The model is left changed: call this within ``as_it_was``.
        loss: of output and batch. Default: the mean squared distance of the first floating tensor from random numbers.
    """
    set_training(seen.model)
    hooks = _Hooks(seen)
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        hooks.put(stack)
        try:
            with Logits(seen.model, stack) as logits:
                output = seen.run()
        except Exception as error:
            refused = [norm for norm in seen.norms if any(call.elements == 1 for call in norm.calls)]
            if not refused:
                raise
            seen.notes.append(f"no backward pass: the model does not run in training mode: {error}")
            seen.model.eval()
            with torch.no_grad(), Logits(seen.model, stack) as logits:
                seen.run()
            seen.attention = logits.found()
            return
        seen.attention = logits.found()
        hooks.forward = False
        _backward(seen, output, loss)


def set_training(model: nn.Module) -> None:
    """Training mode, as the model's own ``train`` makes it, without dropout: what it drops is no dead channel."""
    model.train()
    for module in model.modules():
        if "drop" in type(module).__name__.lower() and not isinstance(module, nn.RNNBase):
            module.training = False


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave modes, parameters, buffers, gradients, hooks and random generators as they were, bit for bit."""
    opened = Transaction(model, written=list(model.buffers()))
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    with forked() as seed:
        seed()
        try:
            yield
        finally:
            opened.restore()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)


def _backward(seen: Observed, output: Any, loss: Callable[[Any, Any], Tensor] | None) -> None:
    if loss is not None:
        value = loss(output, seen.batch)
    else:
        given = [part for part in tensors_in(output) if part.is_floating_point()]
        # Not against zero: the squares of a normalized output are constant, and would have no gradient.
        value = (given[0].float() - torch.randn_like(given[0].float())).square().mean() if given else None
    parameters = [parameter for parameter in seen.model.parameters() if parameter.requires_grad]
    if value is None or not value.requires_grad or not parameters:
        seen.notes.append("no backward pass: the loss depends on no parameter that is trained")
        return
    try:
        # Not backward(): hooks that step an optimizer, or reduce over processes, wait for accumulated gradients.
        torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        # Reentrant checkpointing knows backward() alone; gradients and, as a hook may step, parameters are put back.
        kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None  # what is there would be added to in place
        value.backward()
        with torch.no_grad():
            for parameter, was in kept:
                parameter.copy_(was)


def _recognized(name: str, module: nn.Module) -> Seen:
    try:
        norm = read_norm(name, module)
    except SurgeryError:
        norm = None
    card = card_of(module)
    over_batch = card is not None and "n" in reach(card, module) and "frozen" not in card.name
    return Seen(name, module, norm, _support(module, norm), over_batch, module.training)


def _support(module: nn.Module, norm: Norm | None) -> Support | None:
    if isinstance(module, Layer):
        return module.rule.support
    if norm is None:
        return None
    if norm.kind in ("batch_norm", "sync_batch_norm"):
        return Support(norm.axes, over="n *")
    if norm.kind == "instance_norm":
        return Support(norm.axes, over="*")
    if norm.kind == "group_norm":
        return Support("n (g c) *", over="c *", g=int(norm.option))
    if norm.kind in ("layer_norm", "rms_norm"):
        last = " ".join(f"d{k}" for k in range(max(1, len(norm.shape))))
        return Support("n c *", over=norm.option) if norm.option else Support(f"* {last}", over=last)
    return None


class _Hooks:
    def __init__(self, seen: Observed) -> None:
        self.seen, self.forward = seen, True
        self._outputs: dict[int, tuple[weakref.ref[Tensor], str, nn.Module]] = {}
        self._given: dict[int, tuple[tuple[int, ...], bool, Call]] = {}

    def put(self, stack: ExitStack) -> None:
        for name, layer in self.seen.model.named_modules():
            if isinstance(layer, nn.Linear | _ConvNd):
                stack.callback(layer.register_forward_hook(partial(self._fed, name)).remove)
        for norm in self.seen.norms:
            stack.callback(norm.module.register_forward_pre_hook(partial(self._enter, norm), with_kwargs=True).remove)
            stack.callback(norm.module.register_forward_hook(partial(self._leave, norm)).remove)

    def _fed(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if self.forward and isinstance(output, Tensor):
            self._outputs[id(output)] = weakref.ref(output), name, layer

    def _enter(self, norm: Seen, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter([*args, *kwargs.values()]), None)
        if not self.forward:
            norm.again += 1
            return
        if not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point() or not x.numel():
            return
        held, name, layer = self._outputs.get(id(x), (None, "", None))
        if held is not None and layer is not None and held() is x:
            norm.layer = name, layer
            if x.requires_grad:
                x.register_hook(partial(_take_sums, norm, x.dim() - 1 - len(getattr(layer, "kernel_size", ()))))
        with torch.no_grad():
            call = _measured(norm, x.detach(), module.training)
        norm.calls.append(call)
        self._given[id(norm)] = x.stride(), _is_dense(x), call

    def _leave(self, norm: Seen, module: nn.Module, args: Any, output: Any) -> None:
        if not self.forward or id(norm) not in self._given or not isinstance(output, Tensor):
            return
        strides, dense, call = self._given.pop(id(norm))
        call.training = module.training  # as a hook, or the module itself, may have set it
        if dense and output.shape == call.shape and _is_dense(output):
            sizes = zip(call.shape, strides, output.stride(), strict=True)
            if any(size > 1 and before != after for size, before, after in sizes):
                call.moved = output.numel() * output.element_size()
        if output.requires_grad and output.dim() > 1:
            output.register_hook(partial(_take_gradient, norm, norm.channel))


def _measured(norm: Seen, x: Tensor, training: bool) -> Call:
    call = Call(tuple(x.shape), x.dtype, training)
    kind = "" if norm.norm is None else norm.norm.kind
    if norm.support is not None and (training or not norm.over_batch) and "frozen" not in kind:
        try:
            split = norm.support.split(x.shape)
        except ValueError:  # of another rank: the norm itself will say so
            split = None
        if split is not None:
            call.elements = split.count
            if split.count > 1 and not any(word in kind for word in _WITHOUT_CENTRING):
                var, mean = torch.var_mean(_wide(x).reshape(split.shape), split.dims, correction=0)
                eps = 0.0 if norm.norm is None else norm.norm.guard(x.dtype)
                offset = (mean.abs() * (var + eps).rsqrt())[var > 0]
                if offset.numel():
                    # Half of the digits are gone: E[x^2] - E[x]^2 has none that are right.
                    call.offset = float(offset.max())
                    call.beyond = float((offset > torch.finfo(x.dtype).eps ** -0.5).float().mean())
    if norm.over_batch and x.dim() > 1:
        channel = norm.channel % x.dim()
        wide = _wide(x).movedim(channel, 1).flatten(2) if x.dim() > 2 else _wide(x)[:, :, None]
        call.var, call.mean = torch.var_mean(wide, (0, 2), correction=0)
        call.samples = len(x)
        between = wide.mean(2).var(0, correction=0) / len(x)
        alive = call.var > 0
        if len(x) == 1:
            call.effective = 1.0
        elif alive.any():
            found = (call.var[alive] / between[alive]).median() if (between[alive] > 0).all() else None
            call.effective = math.inf if found is None else float(found)
    return call


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _is_dense(x: Tensor) -> bool:
    """Whether elements fill their memory in some order of the axes, each once."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _take_sums(norm: Seen, channel: int, gradient: Tensor) -> None:
    wide = _wide(gradient.detach()).movedim(channel, 0).flatten(1)
    total, all_of_it = wide.sum(1).abs(), wide.abs().sum(1)
    if (all_of_it > 0).any():
        norm.cancelled = max(norm.cancelled or 0.0, float((total / all_of_it)[all_of_it > 0].max()))


def _take_gradient(norm: Seen, channel: int, gradient: Tensor) -> None:
    squares = _wide(gradient.detach()).movedim(channel, 0).flatten(1).square().mean(1)
    found = squares.sqrt()
    norm.gradient = found if norm.gradient is None else torch.maximum(norm.gradient, found)
    norm.rows += gradient.numel() // len(found)
