"""Give a model's norms to normkit's own layers of the same kind: the same function, on faster kernels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normkit.activations.rms_norm import RMSNorm
from normkit.core.errors import SurgeryError
from normkit.engine.layer import Layer
from normkit.surgery.changes import Changes, Refusal, Refusals, label
from normkit.surgery.norms import Norm, is_norm, read_norm
from normkit.surgery.probe import probe_gated
from normkit.surgery.select import Where
from normkit.surgery.substitute import build_all, lost, put_heard
from normkit.surgery.target import Target, any_tensor, norm_cards
from normkit.surgery.transaction import transaction

# Of which normkit has kernels; the others are left to whoever made them.
_KINDS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")


def accelerate(
    model: nn.Module,
    *,
    where: Where | None = None,
    example: Any = None,
    on_refusal: Refusal = "leave",
    optimizer: torch.optim.Optimizer | None = None,
) -> Changes:
    """Put normkit's layer in the place of every norm that computes what it does, in place; the model computes what it did.

    A norm of torch.nn is known by its class. Any other - a subclass, or a class of its own with "norm" in its name - is known by
    what it computes: with random parameters, on random inputs, in float64 and, for the order in which it rounds, in bfloat16. So
    the norms of language models are taken over with their 1 + weight and their rounding, norms over the channels of images with
    their axis, an activation behind the norm fused, weights per head, and gated norms, as in Mamba-2, with their order.

    Parameters and buffers are the very same objects (but for running statistics of a half type, which become float32), so an
    optimizer goes on, and the state_dict has the same keys. Kept too are dtype, device, training flag, hooks, what the user set
    (``qconfig``), and that one module stands in several places. The row says which attributes of a class of its own are gone.

    ``isinstance`` still finds ``nn.LayerNorm``, ``nn.GroupNorm`` and ``nn.RMSNorm``; in the place of ``nn.BatchNorm2d``,
    ``nn.InstanceNorm2d`` and their like stands one class for every rank: look for ``nn.modules.batchnorm._BatchNorm`` or
    ``nn.modules.instancenorm._InstanceNorm`` instead, as the row says.

    ``where``, ``example``, ``on_refusal`` and ``optimizer``, and errors, are those of ``convert``; what can't be taken over is
    left, unless ``on_refusal="raise"`` refuses the whole.

    >>> print(accelerate(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SyncBatchNorm(8))))
    layer  before        after         note
    1      LayerNorm(8)  LayerNorm(8)
    passed over
    2      (SyncBatchNorm): sync_batch_norm has no faster kernel here
    """
    refusals = Refusals("accelerate", on_refusal)
    found = {name: module for name, module in model.named_modules() if _is_candidate(name, module)}
    like = any_tensor(model)

    def make(name: str, module: nn.Module, seen: Sequence[int] | None) -> tuple[nn.Module, str]:
        made = probe_gated(module) or _build(name, module, read_norm(name, module), like)
        kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules."))
        kind = next(kinds, nn.Module)
        notes = [] if isinstance(made, kind) else [f"isinstance(_, nn.{kind.__name__}) no longer holds"]
        gone = lost(made, module)
        return made, "; ".join([*notes, f"its {', '.join(gone)} dropped"] if gone else notes)

    pairs, rows = build_all(model, found, where, example, make, refusals)
    with transaction(model, optimizer) as opened:
        root = put_heard(model, pairs, rows, example, refusals)
        return opened.close(root, rows.values(), refusals)


def _is_candidate(name: str, module: nn.Module) -> bool:
    if "parametrizations" in name.split(".") or isinstance(module, Layer):
        return False
    own = any(True for _ in module.parameters(recurse=False))
    return is_norm(module) or (own and "norm" in type(module).__name__.lower() and not [*module.children()])


def _build(name: str, module: nn.Module, norm: Norm, like: torch.Tensor) -> nn.Module:
    """The layer here that computes what a norm does; refused where none does."""
    who = f"{label(name)} ({type(module).__name__})"
    if norm.kind not in _KINDS:
        raise SurgeryError(f"{who}: {norm.kind} has no faster kernel here")
    if norm.tracks and norm.kind != "batch_norm":
        raise SurgeryError(f"{who}: it keeps running statistics, which normkit's {norm.kind} does not")
    if isinstance(norm.activation, nn.Module):
        raise SurgeryError(f"{who}: it applies {type(norm.activation).__name__} too, which no layer here fuses")
    if not norm.shape:
        raise SurgeryError(f"{who}: it takes any number of features, and a layer here one")
    rounds = like if norm.weight is None else norm.weight
    if norm.cast != "after weight" and norm.kind != "rms_norm":
        if rounds.dtype not in (torch.float32, torch.float64):
            raise SurgeryError(f"{who}: it rounds a half type otherwise than normkit's {norm.kind}")
        norm = replace(norm, cast="after weight")
    norm = replace(norm, has_bias=True)  # one without stays without
    made, note = Target(norm_cards()[norm.kind].word, norm.kind, norm.option).build(name, norm, like)
    if note:
        raise SurgeryError(f"{who}: it can't be taken over as it is: {note}")
    if isinstance(made, RMSNorm):
        made.eps, made.cast = norm.eps, norm.cast or "after weight"
    return made
