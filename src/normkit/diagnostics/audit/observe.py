"""One forward and one backward pass under hooks, which keep numbers and no activations."""

import inspect
import math
import random
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import DataLoader

from normkit.catalogue.citation import card_of
from normkit.core.errors import OptionError, ShapeError, SurgeryError
from normkit.core.support import Support
from normkit.diagnostics.subject import is_reentrant, refuse_lazy
from normkit.engine.layer import Layer
from normkit.engine.onlooker import Onlooker
from normkit.engine.plan import is_dense
from normkit.surgery.changes import label
from normkit.surgery.norms import Norm, is_norm, reach, read_norm
from normkit.surgery.transaction import Transaction
from normkit.surgery.watch import forked, run_on, tensors_in

Loss = Callable[[Any, Any], Tensor]
_WITHOUT_CENTRING = ("rms", "scale", "response", "divisive")
_SOFTMAX = ("aten._softmax.default", "aten._safe_softmax.default")
_MASKED = -9e3  # most models add -1e4 or less to a masked logit; where it is -100, the largest is not among those
_QUERIES = 256  # of each head, evenly spaced: a largest logit needs no more, and all would be a second attention


@dataclass
class Call:
    """What one call of a norm was given, in numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    training: bool
    elements: int | None = None  # that share one statistic
    offset: float = 0.0  # the largest |mean| / std of a set that varies
    mean: Tensor | None = None  # of each channel, where statistics reach over the batch
    var: Tensor | None = None
    samples: int = 0
    effective: float = math.inf  # independent samples that estimate a channel's mean as well, in the median
    moved: int = 0  # bytes that were written in another memory layout than they came in


@dataclass
class Seen:
    """A norm, and what was seen of it."""

    name: str
    module: nn.Module
    norm: Norm | None  # None where it can't be read
    support: Support | None  # None where statistics are not one rule's
    over_batch: bool
    training: bool  # before the audit
    calls: list[Call] = field(default_factory=list)
    again: int = 0  # calls in the backward pass, as checkpointing makes them
    layer: tuple[str, nn.Module] | None = None  # the Linear or convolution whose very output it read last
    cancelled: float | None = None  # the largest |sum| / sum of || of the gradients of a channel of that output
    gradient: Tensor | None = None  # mean size of each channel's gradient behind the norm
    rows: int = 0  # elements per channel of that

    @property
    def label(self) -> str:
        """The name in findings."""
        return label(self.name)

    @property
    def kind(self) -> str:
        """The method's name; "" where it can't be read."""
        return "" if self.norm is None else self.norm.kind

    @property
    def channel(self) -> int:
        """The axis of channels."""
        return 1 if self.norm is not None and self.norm.axes == "n c *" else -1

    @property
    def keeps_running(self) -> bool:
        """Whether it has running statistics."""
        return any(key.startswith("running_") and kept is not None for key, kept in self.module._buffers.items())

    def is_named(self, name: str, module: nn.Module) -> bool:
        """Whether a name is its own: a predicate for verbs."""
        return name == self.name


@dataclass
class Observed:
    """A model, and all that checks look at."""

    model: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer | None
    run: Callable[[], Any]
    example: Any  # the batch as surgery takes it; None where ``forward=`` reads it in a way of its own
    norms: list[Seen]
    attention: dict[str, tuple[float, float]] = field(default_factory=dict)  # largest logit, relative entropy
    notes: list[str] = field(default_factory=list)


def prepare(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None, forward: Any) -> Observed:
    """Recognize the norms of a model, and how it takes a batch."""
    refuse_lazy(model, "audit")
    if isinstance(batch, DataLoader):
        raise OptionError("audit: batch is a DataLoader; give one batch: next(iter(loader))")
    if optimizer is not None:
        mine = {id(parameter) for parameter in model.parameters()}
        if not any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
            raise OptionError(
                "audit: optimizer has none of the model's parameters; give the one that trains this model, made after the "
                "last change to it"
            )
    example = batch
    if isinstance(batch, list | tuple):
        wrapped = getattr(model, "_orig_mod", model)  # compiled
        wrapped = getattr(wrapped, "module", wrapped)  # parallel
        try:
            inspect.signature(wrapped.forward).bind(*batch)
        except TypeError:  # (inputs, targets), as a loader gives them
            example = batch[0]
    run = partial(run_on, model, example) if forward is None else partial(forward, model, batch)
    named = [(name, each) for name, each in model.named_modules() if "parametrizations" not in name.split(".")]
    norms = [_recognized(name, module) for name, module in named if is_norm(module)]
    return Observed(model, batch, optimizer, run, example if forward is None else None, norms)


def observe(seen: Observed, loss: Loss | None) -> None:
    """Run a model forward and backward in training mode, without dropout, and note what its norms are given.

    Where a norm refuses a set of one element, the forward pass is made in evaluation, and there is no backward pass. The model is
    left changed: call this within ``as_it_was``.
    """
    set_training(seen.model)
    hooks = _Hooks()
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no hooks
        hooks.put(seen, stack)
        try:
            with Logits(seen.model, stack) as logits:
                output = seen.run()
        except Exception as error:
            if not any(call.elements == 1 for norm in seen.norms for call in norm.calls):
                raise
            seen.notes.append(f"no backward pass: the model does not run in training mode: {error}")
            seen.model.eval()
            with suppress(Exception), torch.no_grad():  # some norms refuse the set in evaluation too
                seen.run()
            return
        seen.attention = logits.found()
        hooks.forward = False
        _backward(seen, output, loss)


def set_training(model: nn.Module) -> None:
    """Training mode, as the model's own ``train`` makes it, without dropout: what it drops is no dead channel."""
    model.train()
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            module.training = False
        elif isinstance(module, Layer) and module.dropout:
            module.dropout = 0.0


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave modes, parameters, buffers, gradients, hooks and random generators as they were, bit for bit."""
    opened = Transaction(model, written=list(model.buffers()))
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = None if numpy is None else numpy.random.get_state()
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


def _backward(seen: Observed, output: Any, loss: Loss | None) -> None:
    given = next((part.float() for part in tensors_in(output) if part.is_floating_point()), torch.zeros(()))
    # Not against zero: the squares of a normalized output are constant, and would have no gradient.
    value = loss(output, seen.batch) if loss else (given - torch.randn_like(given)).square().mean()
    parameters = [parameter for parameter in seen.model.parameters() if parameter.requires_grad]
    if not value.requires_grad or not parameters:
        seen.notes.append("no backward pass: the loss depends on no parameter that is trained")
        return
    if not is_reentrant(value):
        # Not backward(): hooks that step an optimizer, or reduce over processes, wait for accumulated gradients.
        torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
        return
    # Reentrant checkpointing knows backward() alone, which adds to gradients in place, and may step the parameters.
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    value.backward()
    with torch.no_grad():
        for parameter, was in zip(parameters, kept, strict=True):
            parameter.copy_(was)


def _recognized(name: str, module: nn.Module) -> Seen:
    try:
        norm = read_norm(name, module)
    except SurgeryError:
        norm = None
    card = card_of(module)
    over_batch = card is not None and "n" in reach(card, module)
    support = module.rule.support if isinstance(module, Layer) else None if norm is None else _support(norm)
    return Seen(name, module, norm, support, over_batch, module.training)


def _support(norm: Norm) -> Support | None:
    over = {"batch_norm": "n *", "sync_batch_norm": "n *", "instance_norm": "*"}.get(norm.kind)
    if norm.kind == "group_norm":
        return Support("n (g c) *", over="c *", g=int(norm.option))
    if norm.kind in ("layer_norm", "rms_norm") and not norm.option:
        last = " ".join(f"d{k}" for k in range(max(1, len(norm.shape))))
        return Support(f"* {last}", over=last)
    over = norm.option if norm.kind in ("layer_norm", "rms_norm") else over
    return Support(norm.axes, over=over) if over else None


class _Hooks:
    """Those of one audit: they note each call in the forward pass, and count calls afterwards."""

    def __init__(self) -> None:
        self.forward = True
        self._outputs: dict[int, tuple[weakref.ref[Tensor], str, nn.Module]] = {}
        self._strides: dict[int, tuple[int, ...]] = {}

    def put(self, seen: Observed, stack: ExitStack) -> None:
        for name, layer in seen.model.named_modules():
            if isinstance(layer, nn.Linear | _ConvNd):
                stack.callback(layer.register_forward_hook(partial(self._fed, name)).remove)
        for norm in seen.norms:
            stack.callback(norm.module.register_forward_pre_hook(partial(self._enter, norm), with_kwargs=True).remove)
            stack.callback(norm.module.register_forward_hook(partial(self._leave, norm)).remove)

    def _fed(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        if self.forward:
            self._outputs[id(output)] = weakref.ref(output), name, layer

    def _enter(self, norm: Seen, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter([*args, *kwargs.values()]), None)
        norm.again += not self.forward
        self._strides.pop(id(norm), None)
        if not self.forward or not isinstance(x, Tensor) or x.is_nested or not (x.is_floating_point() and x.numel()):
            return
        held, name, layer = self._outputs.get(id(x), (None, "", module))
        if held is not None and held() is x:  # not another tensor in the place of one that is gone
            norm.layer = name, layer
            if x.requires_grad:
                x.register_hook(partial(_take_sums, norm, x.dim() - 1 - len(getattr(layer, "kernel_size", ()))))
        with torch.no_grad():
            norm.calls.append(_measured(norm, x.detach(), module.training))
        if is_dense(x.shape, x.stride()):
            self._strides[id(norm)] = x.stride()

    def _leave(self, norm: Seen, module: nn.Module, args: Any, output: Any) -> None:
        if not self.forward or not norm.calls or not isinstance(output, Tensor):
            return
        call, strides = norm.calls[-1], self._strides.get(id(norm))
        call.training = module.training  # as a hook, or the module itself, may have set it
        if strides is not None and output.shape == call.shape and is_dense(output.shape, output.stride()):
            axes = zip(call.shape, strides, output.stride(), strict=True)
            if any(size > 1 and before != after for size, before, after in axes):
                call.moved = output.numel() * output.element_size()
        if output.requires_grad and output.dim() > 1:
            output.register_hook(partial(_take_gradient, norm, norm.channel))


def _measured(norm: Seen, x: Tensor, training: bool) -> Call:
    call, wide, split = Call(tuple(x.shape), x.dtype, training), _wide(x), None
    if norm.support is not None:
        try:
            split = norm.support.split(x.shape)
        except ShapeError:  # the norm itself will say so
            return call
        call.elements = split.count if training or not norm.over_batch else None
    if norm.over_batch and x.dim() > 1:
        wide = wide.movedim(norm.channel, 1).unsqueeze(-1).flatten(2)
        call.var, call.mean = var, mean = torch.var_mean(wide, (0, 2), correction=0)
        found = (var * len(x) / wide.mean(2).var(0, correction=0))[var > 0]
        call.effective = 1.0 if len(x) == 1 else float(found.median()) if len(found) else math.inf
        call.samples = len(x)
    elif split is not None and split.count > 1:
        var, mean = torch.var_mean(wide.reshape(split.shape), split.dims, correction=0)
    else:
        return call
    if not any(word in norm.kind for word in _WITHOUT_CENTRING):
        eps = 0.0 if norm.norm is None else norm.norm.guard(x.dtype)
        call.offset = float((mean.abs() * (var + eps).rsqrt() * (var > 0)).nan_to_num(0.0).max())
    return call


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _take_sums(norm: Seen, channel: int, gradient: Tensor) -> None:
    rows = _wide(gradient.detach()).movedim(channel, 0).flatten(1)
    share = (rows.sum(1) / rows.abs().sum(1)).abs().nan_to_num(0.0)
    if rows.any():
        norm.cancelled = max(norm.cancelled or 0.0, float(share.max()))


def _take_gradient(norm: Seen, channel: int, gradient: Tensor) -> None:
    found = _wide(gradient.detach()).movedim(channel, 0).flatten(1).abs().mean(1)
    norm.gradient = found if norm.gradient is None else torch.maximum(norm.gradient, found)
    norm.rows += gradient.numel() // len(found)


_ATTENDS = re.compile("att(e)?n|mha", re.IGNORECASE)


class Logits(Onlooker):
    """Sees the largest logit and the entropy of attention, by the module that attends."""

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        super().__init__()
        self._scope: list[tuple[str, bool]] = []
        self._seen: dict[str, list[tuple[float, float]]] = {}
        for name, module in model.named_modules():
            entry = name, bool(_ATTENDS.search(type(module).__name__))
            stack.callback(module.register_forward_pre_hook(lambda *_, e=entry: self._scope.append(e)).remove)
            stack.callback(module.register_forward_hook(lambda *_: self._leave(), always_call=True).remove)

    def _leave(self) -> None:
        if self._scope:
            self._scope.pop()

    def found(self) -> dict[str, tuple[float, float]]:
        """The largest logit and the mean entropy, relative to that of uniform weights, by module."""
        return {name: (max(a for a, _ in got), sum(b for _, b in got) / len(got)) for name, got in self._seen.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name in _SOFTMAX:
            if args[0].dim() > 2 and any(attends for _, attends in self._scope):
                rows = args[0].detach().flatten(0, -2)
                self._take(rows[:: max(1, len(rows) // 4096)])
        elif "scaled_dot_product" in name and "backward" not in name:
            query, key, scale = args[0].detach(), args[1].detach().float(), (kwargs or {}).get("scale")
            if query.shape[-3] != key.shape[-3]:  # grouped queries
                key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            query = query[..., :: max(1, query.shape[-2] // _QUERIES), :].float()
            self._take(query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5))
        return func(*args, **(kwargs or {}))

    def _take(self, logits: Tensor) -> None:
        wide, keys = logits.float(), logits.shape[-1]
        seen = wide > _MASKED
        if keys > 1 and seen.any():
            inner = [name for name, attends in self._scope if attends] or [name for name, _ in self._scope] or [""]
            entropy = torch.special.entr(wide.masked_fill(~seen, -math.inf).softmax(-1)).sum(-1) / math.log(keys)
            self._seen.setdefault(inner[-1], []).append((float(wide[seen].max()), float(entropy.nanmean())))
