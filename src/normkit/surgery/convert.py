"""Convert the activation norms of a model to another kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from normkit.core.errors import ShapeError, SurgeryError
from normkit.core.support import show
from normkit.engine.layer import Layer
from normkit.surgery.calibrate import Calibration
from normkit.surgery.changes import Changes, Refusal, Refusals, label
from normkit.surgery.norms import norms_in, reach, read_norm
from normkit.surgery.recurrent import RECURRENT, convert_recurrent
from normkit.surgery.select import Where
from normkit.surgery.sequence import may_be_causal, time_first
from normkit.surgery.substitute import build_all, put_heard
from normkit.surgery.target import Target, any_tensor
from normkit.surgery.transaction import transaction


def convert(
    model: nn.Module,
    to: str,
    *,
    source: str | None = None,
    where: Where | None = None,
    example: Any = None,
    on_refusal: Refusal = "raise",
    optimizer: torch.optim.Optimizer | None = None,
    calibrate: Iterable[Any] | None = None,
) -> Changes:
    """Convert every activation norm of a model to another kind, in place.

    Known are the norms of torch.nn and of normkit, and classes without children whose name contains "norm" and whose output
    on random inputs is that of layer or RMS normalization with gain ``weight`` or ``1 + weight`` or without parameters:
    LayerNorm2d, T5LayerNorm, the RMSNorms of Hugging Face, OLMo's LayerNorm. What is kept: gain and bias (the very parameters),
    eps, momentum, dtype, device, training flag, ``requires_grad``, hooks, public attributes that its user set (``qconfig``), and
    that one module stands in several places. What has no place in the new norm is dropped and what it has more is created; the
    row says so. Where a norm of each position by itself becomes one over positions, through which tokens of a causal model see
    later ones, the row says so too, unless the model can't be causal. A norm that is of the kind already is left as it is,
    whoever made it.

    A norm on channels first, ``(N, C, *)``, becomes ``LayerNorm(C, over="c")`` by ``ln`` where it normalized each position by
    itself, as in ConvNeXt, and else ``LayerNorm(C, over="c *")``; ``rms`` likewise, so that the two differ in centring alone.
    ``ln:c`` and ``ln:c *`` ask for one of them. A norm over the last axis, ``(N, *, C)``, becomes
    ``BatchNorm(C, layout="n * c")`` and the like.

    ``layer_norm_lstm``, ``layer_norm_gru`` and ``layer_norm_rnn`` ask for the layer-normalized form of torch's recurrent layers
    and cells of that kind: weights and biases go over, the norms begin fresh, and the network is to be trained on. It takes no
    packed sequences; layers that run both ways, project their state or drop between layers are refused.

    Args:
        model: any module.
        to: a word such as ``bn``, ``gn:32``, ``ln``, ``ghost:16`` or ``none``, or the method's name, e.g. ``group_norm:32``. With
            ``gcd`` in front, ``gn:gcd32``, each layer gets as many groups as divide both 32 and its channels.
        source: only norms of this kind, e.g. ``"batch_norm"``. Default: every kind.
        where: which of them, as in ``select``, by the names of the norms. Default: all.
        example: an input (a tensor, a tuple of arguments, or a dict of them) on which the model is run before and after, without
            effect on it: a norm that can't take its input, that is not called, or whose parameters are read from outside it, is
            refused, and what a norm alone does not tell (the number of its features, whether its input has positions) is seen.
            Default: None.
        on_refusal: ``"raise"``, or ``"leave"`` to leave a norm that can't be read or replaced as it is. Default: ``"raise"``.
        optimizer: of the model's parameters; it follows: parameters that are created join the group of their layer's, those
            that are dropped leave it. Default: None; make it afterwards then.
        calibrate: batches of inputs, as for ``recalibrate``, on which the new norms are fitted one after another, each in the
            model with those before it fitted, so that the mean and deviation of every channel are those that the old norm gave.
            A row has its layer's error on the old norm's input, relative to what that gave, and the last row that of the
            model's output. Default: None, gain and bias as they were.

    Returns:
        The model (a new one only where the model itself is a norm), a row per norm that was changed, the norms that were passed
        over with the reason, and the way back.

    Raises:
        NotationError: ``to`` or ``where`` can't be read.
        OptionError: another ``on_refusal``.
        SurgeryError: a norm can't be read or replaced, or there is none; the model is left as it was.

    Reference:
        The forms of layer normalization in convolutional networks follow Wu and He, "Group Normalization" (2018),
        https://arxiv.org/abs/1803.08494, where layer normalization is group normalization with one group.

    >>> print(convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "gn:4"))
    layer  before          after            note
    1      BatchNorm2d(8)  GroupNorm(4, 8)  running statistics dropped
    """
    if to in RECURRENT:
        return convert_recurrent(model, to, where, example, Refusals("convert", on_refusal), optimizer)
    target = Target.parse(to)
    kind = None if source is None else Target.parse(source).name
    refusals = Refusals("convert", on_refusal)
    found = norms_in(model)
    if not found and target.name != "none":
        raise SurgeryError(
            f"the model has no activation norm to convert to {target}; begin the recipe with keep or none"
        )
    like, causal, by_time = any_tensor(model), may_be_causal(model, example), time_first(model)

    def make(name: str, module: nn.Module, seen: Sequence[int] | None) -> tuple[nn.Module, str] | None:
        norm = read_norm(name, module, seen)
        if kind not in (None, norm.kind) or (not norm.shape and norm.kind == target.name):
            return None
        made, note = target.build(name, norm, like, causal=causal)
        if target.is_kept(norm, made):
            return None
        if id(module) in by_time:
            _check_time_first(name, target, made)
        if seen is not None:
            _check_several(name, target, made, seen)
        return made, note

    pairs, rows = build_all(model, found, where, example, make, refusals)
    fitted = None
    if calibrate is not None:
        fitted = Calibration(model, pairs, calibrate)
    with transaction(model, optimizer, () if fitted is None else fitted.written) as opened:
        root = put_heard(model, pairs, rows, example, refusals)
        done = [*rows.values()] if fitted is None else fitted.fit(root, rows)
        return opened.close(root, done, refusals)


def _check_time_first(name: str, target: Target, made: nn.Module) -> None:
    """Refuse a norm that would take time steps for samples."""
    axes, card = frozenset() if target.card is None else reach(target.card, made), target.card
    if card is not None and (("*" in axes and "n" not in axes) or card.order_dependent):
        raise SurgeryError(
            f"{label(name)}: {target} normalizes each sample, and reads axis 0 as samples; this transformer was made with "
            "batch_first=False, so axis 0 is time; make it with batch_first=True"
        )


def _check_several(name: str, target: Target, made: nn.Module, seen: Sequence[int]) -> None:
    """Refuse a norm that would subtract from each value of the example itself."""
    if not isinstance(made, Layer) or made.rule.statistic.center is None:
        return
    reduced = made.rule.support.reduced
    if "n" in reduced or "*" not in reduced:  # the batch, or the word, says of how many
        return
    try:
        alone = made.rule.support.split(seen).count == 1
    except ShapeError:  # the run on the example says it
        return
    if alone:
        raise SurgeryError(
            f"{label(name)}: {target} has one value for each statistic on the example (input {show(seen)}), so that its output "
            "would be constant; choose another norm, or leave it with on_refusal='leave'"
        )
