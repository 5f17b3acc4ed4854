"""A monitor of training: condition numbers, activations, gradients and the gap, within a share of the time."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normkit.core.errors import OptionError
from normkit.diagnostics.conditioning import weights_of
from normkit.diagnostics.conditions import spectrum
from normkit.diagnostics.gap import distance_of
from normkit.surgery.watch import tensors_in
from normkit.weights.layout import weight_layout

_SAMPLE = 1 << 14  # elements of an output that are looked at
_LARGE = 1024  # smaller side of a matrix whose singular values take more than about a second


class Monitor:
    """Records how well a model in training is conditioned, as a dictionary for any logger.

    Call ``step()`` once per step, after the optimizer's and before gradients are cleared. Usually it returns None; after a
    sampled step, a dictionary of numbers:

    ===========================  ==================================================================================
    ``condition/WEIGHT``         condition number of a weight as used; so many weights as fit the time, in turns
    ``weight_gradient/WEIGHT``   norm of the raw weight's gradient
    ``activation/MODULE/mean``   of a module's output, as are ``std`` and ``zero``, the share of elements that are 0;
                                 of at most 16384 elements, evenly spread
    ``gradient/MODULE/std``      standard deviation of the loss's gradient by that output
    ``gap/MODULE``               of a batch normalization: its running statistics from those of this batch, as
                                 ``diagnostics.gap`` measures it
    ``monitor/share``            share of the time since the start that the monitor took
    ===========================  ==================================================================================

    Cost: a step is sampled if ``every`` steps have passed since the last, and if with it all that was spent is within ``share``
    of the time of training; so the share holds on average, and samples are rarer where steps are short. Hooks are there in a
    sampled step alone. In such a step compiled models run eagerly, as compiled code calls no hooks. Under
    DistributedDataParallel each process records its own; log one. Sharded weights are not gathered.

    Args:
        model: in training; wrapped by DistributedDataParallel or ``torch.compile`` or not.
        every: least number of steps from sample to sample; the first step is sampled too. Default: 100.
        share: of the time of training that the monitor may take; ``math.inf`` for no limit. Default: 0.02.
        where: which modules to look at, by name and module. Default: those without modules in them.

    Raises:
        OptionError: every below 1, or a share that is not above 0.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> monitor = Monitor(model)
    >>> model(torch.randn(4, 2)).sum().backward()
    >>> record = monitor.step()
    >>> sorted(record)[:3], monitor.step()
    (['activation/0/mean', 'activation/0/std', 'activation/0/zero'], None)
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        share: float = 0.02,
        where: Callable[[str, nn.Module], bool] | None = None,
    ) -> None:
        if every < 1 or not share > 0:
            raise OptionError(f"Monitor: every={every}, share={share}; wanted steps from 1, and a share above 0")
        inner: Any = model
        while isinstance(inner, DistributedDataParallel) or hasattr(inner, "_orig_mod"):
            inner = inner.module if isinstance(inner, DistributedDataParallel) else inner._orig_mod
        self.every, self.share = every, share
        self.spent, self.elapsed = 0.0, 0.0
        self._modules = [
            (name, module)
            for name, module in inner.named_modules()
            if (where(name, module) if where is not None else not any(True for _ in module.children()))
        ]
        self._weights = [(label, layer, key, raw) for label, layer, key, raw, _ in weights_of(inner)]
        self._turn, self._since = 0, 0
        # Of the last sample, without condition numbers, and of them per element and singular value.
        self._sample_cost, self._pace = 0.0, 0.0
        self._handles: list[Any] = []
        self._stance: Any = None
        self._found: dict[str, Tensor] = {}
        self._clock = time.perf_counter()
        self._attach()

    def step(self) -> dict[str, float] | None:
        """Count a step; a record if it was sampled."""
        self.elapsed += time.perf_counter() - self._clock
        self._since += 1
        record = self._record() if self._handles else None
        if self._since + 1 >= self.every and self._affords(self._sample_cost):
            self._attach()
        self._clock = time.perf_counter()
        return record

    def close(self) -> None:
        """Remove the hooks, if the step is a sampled one."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _affords(self, cost: float) -> bool:
        return self.spent + cost <= self.share * self.elapsed

    def _attach(self) -> None:
        start = time.perf_counter()
        self._sample_cost = -self.spent
        self._found = {}
        for name, module in self._modules:
            self._handles.append(module.register_forward_hook(self._timed(self._see, name)))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                self._handles.append(module.register_forward_pre_hook(self._timed(self._compare, name)))
        if "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
        self.spent += time.perf_counter() - start

    def _timed(self, function: Callable[..., None], name: str) -> Callable[..., None]:
        def run(*args: Any) -> None:
            if torch.is_grad_enabled():  # validation between two steps is not looked at
                start = time.perf_counter()
                function(name, *args)
                self.spent += time.perf_counter() - start

        return run

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        y = next(tensors_in(output), None)
        if f"activation/{name}/mean" in self._found or y is None or not y.is_floating_point() or not y.numel():
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
        x = next(tensors_in(args), None)
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
                self._found[f"weight_gradient/{label}"] = torch.linalg.vector_norm(raw.grad)
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
            for _, _, found, _, used in weights_of(layer, lambda _, module, layer=layer: module is layer):
                matrix = weight_layout(layer, key).matrix(used)
                if found == key and min(matrix.shape) <= _LARGE:
                    record[f"condition/{label}"] = spectrum(matrix).condition
                    self._pace = (time.perf_counter() - start) / work
            self.spent += time.perf_counter() - start


def _sample(x: Tensor) -> Tensor:
    """About 16384 elements, at a distance that has no common divisor with any axis, so that all channels are among them."""
    step = -(-x.numel() // _SAMPLE)
    while math.gcd(step, x.numel()) > 1:
        step += 1
    return x.flatten()[::step].float()
