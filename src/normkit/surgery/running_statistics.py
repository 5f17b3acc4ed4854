"""Trained running statistics, carried along where the weight before them is changed."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.activations.batch_renorm import BatchRenorm
from normkit.surgery.changes import label
from normkit.surgery.watch import try_on
from normkit.weights.layout import weight_layout

# In evaluation one mean and one deviation per channel, which it has kept.
_KINDS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, BatchGroupNorm, BatchRenorm)
_POWERS = {"running_var": 2, "running_std": 1}
_CURE = "call recalibrate(model, batches) before evaluation"


class Statistics:
    """The trained running statistics of a model, and which layers they lie behind; false where there are none.

    Of a layer z = W x + b whose rows are scaled by s > 0, the new output is s (z - b) + b: a norm that has kept the mean and the
    variance of z is right for it with s (mean - b) + b and s^2 var, up to its eps.
    """

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        self._names = {module: name for name, module in model.named_modules() if _is_trained(module)}
        self._calls = _calls(model) if self._names else None
        seen = try_on(model, example, self._names, "model").shapes if self._names and example is not None else {}
        self._ranks = {norm: len(seen[id(norm)]) for norm in self._names if id(norm) in seen}
        self._norms = {call: norm for norm in self._names for call in (self._calls or {}).get(norm, [])}

    def __bool__(self) -> bool:
        return bool(self._names)

    def carry(self, layer: nn.Module, name: str, before: Tensor, after: Tensor) -> str:
        """Carry the statistics behind a layer along with its weight; return what there is to know, or nothing."""
        factors = _factors(before, after, layer, name)
        if factors is not None and bool(((factors - 1).abs() <= 4 * torch.finfo(before.dtype).eps).all()):
            return ""
        if self._calls is None:
            return f"running statistics behind it, if there are any, are those of the weight before; {_CURE}"
        calls = self._calls.get(layer, [])
        norm = self._next(calls)
        if norm is not None and factors is not None and _fits(layer, norm, factors, self._ranks.get(norm)):
            _rescale(norm, factors, getattr(layer, "bias", None))
            return f"running statistics of {label(self._names[norm])} carried along"
        stale = [name for norm, name in self._names.items() if norm in self._behind(calls)]
        if not stale:
            return ""
        shown = ", ".join(stale[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
        return f"running statistics of {shown} are those of the weight before; {_CURE}"

    def _next(self, calls: list[fx.Node]) -> nn.Module | None:
        """The one norm that reads all that a layer gives, and nothing else."""
        readers = [reader for call in calls for reader in call.users]
        norms = {self._norms.get(reader) for reader in readers}
        norm = norms.pop() if len(norms) == 1 and len(readers) == len(calls) else None
        heard = [call for call, found in self._norms.items() if found is norm]
        return norm if set(heard) == set(readers) and all(call.all_input_nodes[0] in calls for call in heard) else None

    def _behind(self, calls: list[fx.Node]) -> set[nn.Module]:
        seen, left = set(calls), list(calls)
        while left:
            new = [reader for reader in left.pop().users if reader not in seen]
            seen.update(new)
            left += new
        return {self._norms[call] for call in seen if call in self._norms}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


def _calls(model: nn.Module) -> dict[nn.Module, list[fx.Node]] | None:
    """The calls of each module, as tracing the model's forward shows them; None where that can't be traced."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever the forward of a model says to inputs that are no tensors
        return None
    found: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(model.get_submodule(str(node.target)), []).append(node)
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


def _fits(layer: nn.Module, norm: nn.Module, factors: Tensor, rank: int | None) -> bool:
    """Whether a norm, for an input of that rank if it is known, keeps the statistics of each output unit of the layer."""
    if not isinstance(layer, nn.Linear | nn.Bilinear | _ConvNd) or layer._forward_hooks or norm._forward_pre_hooks:
        return False
    known = isinstance(norm, _KINDS) or type(norm).__name__.endswith("FrozenBatchNorm2d")  # torchvision's, detectors'
    first = getattr(norm, "layout", "n c *") == "n c *"
    if isinstance(layer, _ConvNd):
        same = first and rank in (None, 2 + len(layer.kernel_size))
    else:  # gives units last, which is where a norm of axis 1 looks in (N, C) alone; to an instance norm that is (C, positions)
        same = not first or (rank == 2 and not isinstance(norm, nn.modules.instancenorm._InstanceNorm))
    return known and same and norm.get_buffer("running_mean").shape == factors.shape


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
