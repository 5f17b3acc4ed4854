"""Give a model's norms to normkit's own layers of the same kind: the same function, on faster kernels."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from normkit.activations.rms_norm import RMSNorm
from normkit.core.errors import OptionError, SurgeryError, check_options
from normkit.engine.call import Save
from normkit.engine.layer import Layer
from normkit.engine.undo import check_undone
from normkit.surgery.changes import Changes, Refusal, Refusals, label
from normkit.surgery.norms import Norm, is_norm, read_norm
from normkit.surgery.probe import probe_gated
from normkit.surgery.select import Where
from normkit.surgery.substitute import build_all, lost, put_heard
from normkit.surgery.target import Target, any_tensor, norm_cards
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import Sight

# Of which normkit has kernels; the others are left to whoever made them.
_KINDS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")


def accelerate(
    model: nn.Module,
    *,
    where: Where | None = None,
    example: Any = None,
    on_refusal: Refusal = "leave",
    save: Save = "input",
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
    left, unless ``on_refusal="raise"`` refuses the whole. ``save="output"`` keeps each norm's output for the backward pass in the
    place of its input, as its layer's ``save`` does: a tensor less for each norm with a linear layer or convolution right behind
    it. A norm that can't keeps its input, and the row says why: it fuses a ReLU, one of its gains is too small, or its output
    may be changed in place, as by ``nn.ReLU(inplace=True)``. An ``example`` shows where; without one, in a model with
    such a module only norms with a convolution or linear layer next in an ``nn.Sequential`` keep their output.

    >>> print(accelerate(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SyncBatchNorm(8))))
    layer  before        after         note
    1      LayerNorm(8)  LayerNorm(8)
    passed over
    2      (SyncBatchNorm): sync_batch_norm has no faster kernel here
    """
    check_options("accelerate", save=(save, Save))
    refusals = Refusals("accelerate", on_refusal)
    found = {name: module for name, module in model.named_modules() if _is_candidate(name, module)}
    like = any_tensor(model)

    def make(name: str, module: nn.Module, sight: Sight | None) -> tuple[nn.Module, str]:
        made = probe_gated(module) or _build(name, module, read_norm(name, module), like)
        kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules."))
        kind = next(kinds, nn.Module)
        notes = [] if isinstance(made, kind) else [f"isinstance(_, nn.{kind.__name__}) no longer holds"]
        if save == "output" and (why := _keep_output(made, _writer(model, module, sight))):
            notes.append(f"keeps its input, as {why}")
        gone = lost(made, module)
        return made, "; ".join([*notes, f"its {', '.join(gone)} dropped"] if gone else notes)

    pairs, rows = build_all(model, found, where, example, make, refusals)
    with transaction(model, optimizer) as opened:
        root = put_heard(model, pairs, rows, example, refusals)
        return opened.close(root, rows.values(), refusals)


def _keep_output(made: nn.Module, writer: str) -> str:
    """Let a layer keep its output for the backward pass; or give the reason why it keeps its input."""
    if writer:
        return writer
    never = "that can't be computed again from its output"
    if not isinstance(made, Layer):
        return never
    try:
        made.save = "output"
    except OptionError:
        return never
    given = made.weight if made.weight is not None else made.bias
    try:
        if given is not None and not given.is_meta and made.rule.compensation is not None:
            check_undone(made.rule.compensation.offset, given.dtype, made.weight, made.bias)
    except OptionError:
        made.save = "input"
        return "a gain is too small to be undone"
    return ""


def _writer(model: nn.Module, norm: nn.Module, sight: Sight | None) -> str:
    """What may change a norm's output in place; empty where nothing does."""
    if sight is not None and id(norm) in sight.changed:
        return "its output is changed in place"
    # The run on the example is one in evaluation, where dropout does nothing.
    heard = "Dropout" if sight is not None else ""
    kinds = {type(part).__name__ for part in model.modules() if getattr(part, "inplace", False)}
    kinds = sorted(kind for kind in kinds if heard in kind)
    parents = (part for part in model.modules() if type(part).forward is nn.Sequential.forward)
    behind = [b for parent in parents for a, b in pairwise(parent._modules.values()) if a is norm]
    if not kinds or (behind and all(isinstance(layer, nn.Linear | _ConvNd) for layer in behind)):
        return ""
    return f"{' or '.join(kinds)} may change its output in place"


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
