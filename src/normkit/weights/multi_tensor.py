"""Many weights in one call: each is traversed once, all work is split across threads, and autograd gets one node."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from normkit.core.moments import accumulation_dtype
from normkit.engine.abi import like, plain
from normkit.weights import kernels
from normkit.weights.attachment import hooked, originals


class Share(NamedTuple):
    """One weight's part of a call; ``definition`` computes the same, of weight and gain or of weight, left and right vector.

    The vectors are updated in place.
    """

    plan: kernels.Plan
    definition: Callable[..., Tensor]
    weight: Tensor
    gain: Tensor | None = None
    vectors: tuple[Tensor, Tensor] | None = None


@runtime_checkable
class Shares(Protocol):
    """A parametrization that the kernels can run."""

    def share(self, *raw: Tensor) -> Share | None:
        """The raw tensors' part of a call; None where the kernels don't run."""
        ...


def normalize(shares: Sequence[Share]) -> list[Tensor]:
    """Compute the weights of all shares, for which ``kernels.takes`` holds, in one call into the library."""
    if not shares:
        return []
    raw = [tensor for share in shares for tensor in (share.weight, share.gain)]
    return list(cast(tuple[Tensor, ...], _Together.apply(tuple(shares), *raw)))


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """A context in which a model's parametrized weights are computed once, in one call for those that the kernels know.

    It is ``torch.nn.utils.parametrize.cached`` with all weights computed at the start. Put the forward passes of a step inside,
    the backward pass inside or after it, the optimizer's step after it. Weights that are used several times per step are computed
    once, and spectral normalization iterates once. The gradients of all raw weights arrive together at the end of the backward
    pass: do not use the context where something waits for them one by one, such as DistributedDataParallel, where weights are
    not in memory until their layer runs, as with FSDP and offloading, or around checkpointed regions, which are recomputed after.
    """
    # torch's own cache, an internal dictionary: layers look up their weights there, and so need not know of this.
    with parametrize.cached():
        places: list[tuple[int, str]] = []
        shares: list[Share] = []
        for layer in model.modules():
            for name, part, raw in _single_parts(layer):
                share = part.share(*raw) if (id(layer), name) not in parametrize._cache else None
                if share is not None:
                    places.append((id(layer), name))
                    shares.append(share)
        parametrize._cache.update(zip(places, normalize(shares), strict=True))  # pyright: ignore
        yield


def _single_parts(layer: nn.Module) -> Iterator[tuple[str, Shares, list[Tensor]]]:
    """Yield the name, parametrization and raw tensors of each tensor with one parametrization and no hooks."""
    held = layer._modules.get("parametrizations") if parametrize.is_parametrized(layer) else None
    for name, found in held._modules.items() if held is not None else ():
        assert found is not None
        parts = list(found._modules.values())
        if len(parts) == 1 and isinstance(parts[0], Shares) and not hooked(found, parts[0]):
            yield name, parts[0], originals(found)


class _Together(torch.autograd.Function):
    """Weights computed by the kernels; inputs are the shares, then weight and gain of each."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        shares: tuple[Share, ...] = inputs[0]
        results = tuple(torch.empty_like(share.weight) for share in shares)
        kept = [_room(share) for share in shares]
        calls = [
            (share.weight, share.gain, None, result, None, *(share.vectors or (None, None)), room)
            for share, result, room in zip(shares, results, kept, strict=True)
        ]
        kernels.run([share.plan for share in shares], calls, backward=False)
        for share in shares:
            if share.vectors is not None:
                increment_version(share.vectors)  # the library wrote to them without autograd's knowledge
        ctx.plans = [share.plan for share in shares]
        ctx.definitions = [_definition(share, room) for share, room in zip(shares, kept, strict=True)]
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        raw, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        found: list[Tensor | None] = [None] * len(raw)
        plans, calls = [], []
        for k, gradient in enumerate(gradients):
            weight, gain = raw[2 * k : 2 * k + 2]
            if gradient is None or not any(needed[2 * k : 2 * k + 2]):
                continue
            if torch.is_grad_enabled() or not plain(gradient):
                both = needed[2 * k : 2 * k + 2]
                found[2 * k : 2 * k + 2] = kernels.gradients_by(ctx.definitions[k], (weight, gain), both, gradient)
                continue
            result, dgain = torch.empty_like(weight), None if gain is None else torch.empty_like(gain)
            found[2 * k : 2 * k + 2] = result, dgain
            plans.append(ctx.plans[k])
            calls.append((weight, gain, like(gradient, weight), result, dgain, None, None, ctx.kept[k]))
        if plans:
            kernels.run(plans, calls, backward=True)
        return None, *found


def _room(share: Share) -> Tensor | None:
    """Where forward keeps what it measured, of a weight that has vectors."""
    if share.vectors is None:
        return None
    return share.weight.new_empty(1 + sum(len(v) for v in share.vectors), dtype=accumulation_dtype(share.weight.dtype))


def _definition(share: Share, room: Tensor | None) -> Callable[..., Tensor]:
    if share.vectors is None or room is None:
        return share.definition
    left, right = room[1:].split([len(v) for v in share.vectors])
    return functools.partial(_by_vectors, share.definition, left, right)


def _by_vectors(definition: Callable[..., Tensor], left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    return definition(weight, left, right)
