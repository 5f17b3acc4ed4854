"""A monitor of training: condition numbers, activations, gradients and the gap, within a share of the time."""

import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normkit.core.errors import OptionError
from normkit.diagnostics.conditioning import raw_and_used, weights_of
from normkit.diagnostics.gap import distance_of
from normkit.diagnostics.spectrum import EXACT, spectrum
from normkit.diagnostics.subject import Where, chosen
from normkit.surgery.watch import tensors_in
from normkit.weights.layout import weight_layout

_SAMPLE = 1 << 14  # elements of an output that are looked at


class Monitor:
    """Records how well a model in training is conditioned, as a dictionary for any logger.

    Call ``step()`` once per step, after the optimizer's and before gradients are cleared. Usually it returns None; after a
    sampled step, a dictionary of numbers:

    ===========================  ==================================================================================
    ``condition/WEIGHT``         condition number of a weight as used: of the next few weights, as time allows
    ``weight_gradient/WEIGHT``   norm of the raw weight's gradient
    ``activation/MODULE/mean``   of a module's output, as are ``std`` and ``zero``, the share of elements that are 0;
                                 of at most 16384 elements, evenly spread
    ``gradient/MODULE/std``      standard deviation of the loss's gradient by that output
    ``gap/MODULE``               of a batch normalization: its running statistics from those of this batch, as
                                 ``diagnostics.gap`` measures it
    ``monitor/share``            share of the time since the start that the monitor took
    ===========================  ==================================================================================

    Cost: a step is sampled if ``every`` steps have passed since the last, and if with it all that was spent is within ``share``
    of the time of training; so samples are rarer where steps are short. Hooks are there in a sampled step alone, in which
    compiled code runs eagerly, as it calls no hooks; ``close()`` ends it early, as after an exception.

    Of several forward passes in a step, the first is looked at. A gradient scaler's factor is in ``gradient``, and not in
    ``weight_gradient``. Each process records its own batch. Of weights that are sharded (``fully_shard``, tensor parallelism)
    nothing is recorded, of their modules' outputs the local part. Calls within ``torch.func`` transforms are not seen.

    Args:
        model: in training; wrapped by DistributedDataParallel or ``torch.compile`` or not.
        every: least number of steps from sample to sample; the first step is sampled too. Default: 100.
        share: of the time of training that the monitor may take; ``math.inf`` for no limit. Default: 0.02.
        where: which modules to look at, by name and module. Default: those without modules in them.

    Raises:
        OptionError: every below 1, a share that is not above 0, or a lazy layer without a size yet.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> monitor = Monitor(model)
    >>> model(torch.randn(4, 2)).sum().backward()
    >>> record = monitor.step()
    >>> sorted(record)[:3], monitor.step()
    (['activation/0/mean', 'activation/0/std', 'activation/0/zero'], None)
    """

    def __init__(self, model: nn.Module, every: int = 100, *, share: float = 0.02, where: Where | None = None) -> None:
        if every < 1 or not share > 0:
            raise OptionError(f"Monitor: every={every}, share={share}; wanted steps from 1, and a share above 0")
        inner: Any = model
        while isinstance(inner, DistributedDataParallel | DataParallel) or hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
        self.every, self.share = every, share
        self.spent, self.elapsed = 0.0, 0.0
        self._modules = chosen(inner, where)
        found = weights_of(inner, None, "Monitor")
        self._weights = [(label, layer, key, raw) for label, layer, key, raw, _ in found if not _is_sharded(raw)]
        self._turn, self._since = 0, 0
        # Of the last sample, without condition numbers, and of them per element and singular value.
        self._sample_cost, self._pace = 0.0, 0.0
        self._found: dict[str, Tensor] = {}
        self._sampling, self._stack = False, ExitStack()
        weakref.finalize(self, self._stack.close)  # code must not stay eager when the monitor is dropped
        import_module("torch._dynamo")  # which has the stance; a second, once, that torch's optimizers take as well
        self._clock = time.perf_counter()
        self._attach()

    def step(self) -> dict[str, float] | None:
        """Count a step; a record if it was sampled."""
        self.elapsed += time.perf_counter() - self._clock
        self._since += 1
        record = self._record() if self._sampling else None
        if self._since + 1 >= self.every and self._affords(self._sample_cost):
            self._attach()
        self._clock = time.perf_counter()
        return record

    def close(self) -> None:
        """Remove the hooks, if the step is a sampled one."""
        self._sampling = False
        self._stack.close()

    def _affords(self, cost: float) -> bool:
        return self.spent + cost <= self.share * self.elapsed

    def _attach(self) -> None:
        start = time.perf_counter()
        self._sample_cost, self._sampling, self._found = -self.spent, True, {}
        for module, name in self._modules.items():
            timed = weakref.WeakMethod(self._timed)
            self._stack.callback(module.register_forward_hook(_Hook(timed, Monitor._see, name)).remove)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                self._stack.callback(module.register_forward_pre_hook(_Hook(timed, Monitor._compare, name)).remove)
        self._stack.enter_context(_eager())
        self.spent += time.perf_counter() - start

    def _timed(self, look: Callable[..., None], name: str, *args: Any) -> None:
        if torch.is_grad_enabled():  # validation between two steps is not looked at
            start = time.perf_counter()
            look(self, name, *args)
            self.spent += time.perf_counter() - start

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        y = _plain(output)
        if f"activation/{name}/mean" in self._found or y is None:
            return
        x = _sample(y.detach())
        var, mean = torch.var_mean(x, correction=0)
        zero = 1 - x.count_nonzero() / x.numel()
        for key, value in (("mean", mean), ("std", var.sqrt()), ("zero", zero)):
            self._found[f"activation/{name}/{key}"] = value

        def see_gradient(gradient: Tensor) -> None:
            start = time.perf_counter()
            self._found[f"gradient/{name}/std"] = _sample(gradient.detach()).std(correction=0)
            self.spent += time.perf_counter() - start

        if y.requires_grad:
            y.register_hook(see_gradient)

    @torch.no_grad()
    def _compare(self, name: str, module: nn.Module, args: Any) -> None:
        norm: Any = module
        x = _plain(args)
        if not norm.training or x is None or f"gap/{name}" in self._found:
            return
        channels = x.dim() - 1 if getattr(norm, "layout", "n c *") == "n * c" else 1
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != channels], correction=0)
        running = (norm.running_var + norm.eps).sqrt()
        distance = distance_of(norm.running_mean, running, mean, (var + norm.eps).sqrt())
        self._found[f"gap/{name}"] = distance.square().mean().sqrt()

    @torch.no_grad()
    def _record(self) -> dict[str, float]:
        self.close()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else the step's own work would count as the monitor's
        start = time.perf_counter()
        for label, _, _, raw in self._weights:
            if raw.grad is not None:
                gradient = raw.grad.coalesce().values() if raw.grad.is_sparse else raw.grad
                self._found[f"weight_gradient/{label}"] = torch.linalg.vector_norm(gradient)
        record: dict[str, float] = {}
        for device in {value.device for value in self._found.values()}:
            here = {key: value for key, value in self._found.items() if value.device == device}
            record |= zip(here, torch.stack([value.float() for value in here.values()]).tolist(), strict=True)
        self.spent += time.perf_counter() - start
        self._sample_cost += self.spent
        self._conditions(record)
        self._found, self._since = {}, 0
        record["monitor/share"] = self.spent / max(self.elapsed, 1e-9)
        return record

    def _conditions(self, record: dict[str, float]) -> None:
        """Condition numbers of the next weights, while there is time."""
        for _ in range(len(self._weights)):
            label, layer, key, raw = self._weights[self._turn]
            work = raw.numel() * min(raw.shape[0], raw[0].numel())
            if not self._affords(self._pace * work):
                return
            start = time.perf_counter()
            self._turn = (self._turn + 1) % len(self._weights)
            matrix = weight_layout(layer, key).matrix(raw_and_used(layer, key)[1])
            if min(matrix.shape) <= EXACT:  # that of a larger one takes more than about a second
                record[f"condition/{label}"] = spectrum(matrix).condition
                self._pace = (time.perf_counter() - start) / work
            self.spent += time.perf_counter() - start


class _Hook:
    """A hook that dies with its monitor, and does nothing in copies and files of its module: they outlive the sampled step."""

    def __init__(self, find: Callable[[], Any] = lambda: None, *known: Any) -> None:
        self._find, self._known = find, known

    def __call__(self, *args: Any) -> None:
        if (run := self._find()) is not None:
            run(*self._known, *args)

    def __reduce__(self) -> Any:
        return _Hook, ()


_samplers, _stance = 0, ExitStack()


@contextmanager
def _eager() -> Iterator[None]:
    """The compiler's stance is one for all models: it is eager from the first monitor's sample to the last one's end."""
    global _samplers
    if not _samplers:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _samplers += 1
    try:
        yield
    finally:
        _samplers -= 1
        if not _samplers:
            _stance.close()


def _is_sharded(x: Tensor) -> bool:
    # A DTensor's numbers would be gathered from all processes, which may not all sample this step.
    return hasattr(x, "to_local")


def _plain(values: Any) -> Tensor | None:
    """The first tensor, or the local part of it, if it has floating numbers that outlive the call."""
    x: Any = next(tensors_in(values), None)
    x = x.to_local() if x is not None and _is_sharded(x) else x
    wrong = x is None or not x.is_floating_point() or not x.numel() or is_functorch_wrapped_tensor(x)
    return None if wrong else x


def _sample(x: Tensor) -> Tensor:
    """About 16384 elements, at a distance that has no common divisor with any axis, so that all channels are among them."""
    step = -(-x.numel() // _SAMPLE)
    while math.gcd(step, x.numel()) > 1:
        step += 1
    return x.flatten()[::step].float()
