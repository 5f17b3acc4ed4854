"""Running statistics carried along where a weight method rescales the layer before them.

Of a layer z = W x + b whose rows are scaled by s > 0, the new output is s (z - b) + b: a norm that has kept the mean and the
variance of z is right for it with s (mean - b) + b and s^2 var, up to its eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.activations.batch_renorm import BatchRenorm
from normkit.surgery.changes import label
from normkit.weights.layout import weight_layout

# In evaluation one mean and one deviation a channel, which it has kept.
_KINDS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, BatchGroupNorm, BatchRenorm)
_POWERS = {"running_var": 2, "running_std": 1}
_CURE = "call recalibrate(model, batches) before evaluation"


class Statistics:
    """The trained running statistics of a model, and which layers they lie behind.

    Args:
        model: as it is before weight methods are put on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = {id(module): name for name, module in model.named_modules() if _is_trained(module)}
        self._model = model
        self._calls: dict[int, list[fx.Node]] | None = None
        if self._norms:
            self._calls = _calls(model, self._norms)

    def carry(self, layer: nn.Module, name: str, before: Tensor, after: Tensor) -> str:
        """Carry the statistics behind a layer along with its weight; return what there is to know, or nothing.

        Args:
            layer: in the model.
            name: of its weight.
            before: the weight's value before.
            after: now.
        """
        if not self._norms:
            return ""
        factors = _factors(before, after, layer, name)
        if factors is not None and bool((factors - 1).abs().max() <= 4 * torch.finfo(before.dtype).eps):
            return ""
        if self._calls is None:
            return f"running statistics behind it, if there are any, are those of the weight before; {_CURE}"
        calls = self._calls.get(id(layer), [])
        norm = self._next(calls)
        if norm is not None and factors is not None and _fits(layer, norm, factors):
            _rescale(norm, factors, getattr(layer, "bias", None))
            return f"running statistics of {label(self._norms[id(norm)])} carried along"
        stale = {self._norms[id(found)]: None for call in calls for found in self._behind(call)}
        if not stale:
            return ""
        shown = ", ".join(list(stale)[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
        return f"running statistics of {shown} are those of the weight before; {_CURE}"

    def _next(self, calls: list[fx.Node]) -> nn.Module | None:
        """The one norm that reads all that a layer gives, and nothing else."""
        assert self._calls is not None
        readers = [reader for call in calls for reader in call.users]
        norms = {id(norm): norm for reader in readers if (norm := self._norm(reader)) is not None}
        if len(norms) != 1 or len(readers) != len(calls):
            return None
        (norm,) = norms.values()
        heard = self._calls[id(norm)]
        one_to_one = (
            heard and set(heard) == set(readers) and all(reader.all_input_nodes[0] in calls for reader in heard)
        )
        return norm if one_to_one else None

    def _norm(self, call: fx.Node) -> nn.Module | None:
        module = self._model.get_submodule(str(call.target)) if call.op == "call_module" else None
        return module if id(module) in self._norms else None

    def _behind(self, call: fx.Node) -> Iterator[nn.Module]:
        seen, open_ = {call}, [call]
        while open_:
            for reader in open_.pop().users:
                if reader not in seen:
                    seen.add(reader)
                    open_.append(reader)
                    norm = self._norm(reader)
                    if norm is not None:
                        yield norm


class _Tracer(fx.Tracer):
    def __init__(self, leaves: dict[int, str]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            id(m) in self._leaves
            or next(m.children(), None) is None
            or super().is_leaf_module(m, module_qualified_name)
        )


def _calls(model: nn.Module, norms: dict[int, str]) -> dict[int, list[fx.Node]] | None:
    """The calls of each module by its id, as tracing the model's forward shows them; None where that can't be traced."""
    try:
        graph = _Tracer(norms).trace(model)
    except Exception:  # whatever the forward of a model says to inputs that are no tensors
        return None
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(id(model.get_submodule(str(node.target))), []).append(node)
    return found


def _is_trained(module: nn.Module) -> bool:
    """Whether a module keeps running statistics that are no longer those it was made with."""
    mean = module._buffers.get("running_mean")
    if not isinstance(mean, Tensor) or mean.is_meta:
        return False
    kept = [(mean, 0.0)] + [(v, 1.0) for key in _POWERS if (v := module._buffers.get(key)) is not None]
    return any(bool((values != start).any()) for values, start in kept)


def _factors(before: Tensor, after: Tensor, layer: nn.Module, name: str) -> Tensor | None:
    """What each output unit's weights were multiplied by, in float64; None where that is not one positive number each."""
    if before.shape != after.shape or name != "weight" or before.dim() < 2:
        return None
    split = weight_layout(layer, name).rows.split(before.shape)
    a, b = (value.double().reshape(split.shape) for value in (before, after))
    total = a.square().sum(split.dims, keepdim=True)
    factors = torch.where(total > 0, (a * b).sum(split.dims, keepdim=True) / total, 1.0)
    # Each element is rounded a few times.
    rest = torch.linalg.vector_norm(b - factors * a, dim=split.dims)
    fits = rest <= 8 * torch.finfo(before.dtype).eps * torch.linalg.vector_norm(b, dim=split.dims)
    return factors.flatten() if bool(fits.all() & (factors > 0).all()) else None


def _fits(layer: nn.Module, norm: nn.Module, factors: Tensor) -> bool:
    """Whether a norm keeps one mean and one deviation of each output unit of the layer before it."""
    if not isinstance(layer, nn.Linear | nn.Bilinear | _ConvNd) or layer._forward_hooks or norm._forward_pre_hooks:
        return False
    known = isinstance(norm, _KINDS) or type(norm).__name__.endswith("FrozenBatchNorm2d")  # torchvision's, detectors'
    last = isinstance(layer, _ConvNd) and getattr(norm, "layout", "n c *") != "n c *"
    return known and not last and norm.get_buffer("running_mean").shape == factors.shape


@torch.no_grad()
def _rescale(norm: nn.Module, factors: Tensor, bias: Any) -> None:
    """In new buffers, as those that were there may be put back."""
    mean = norm.get_buffer("running_mean")
    shift = bias.detach().double() if isinstance(bias, Tensor) else 0.0
    norm._buffers["running_mean"] = ((mean.double() - shift) * factors + shift).to(mean.dtype)
    for key, power in _POWERS.items():
        kept = norm._buffers.get(key)
        if kept is not None:
            norm._buffers[key] = (kept.double() * factors**power).to(kept.dtype)
