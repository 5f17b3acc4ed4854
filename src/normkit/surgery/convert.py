"""Convert the activation norms of a model to another kind, and torch's recurrent layers to layer-normalized ones."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.activations.recurrent_layer_norm import (
    LayerNormGRUCell,
    LayerNormLSTMCell,
    LayerNormRecurrent,
    LayerNormRNNCell,
)
from normkit.core.errors import ShapeError, SurgeryError
from normkit.core.support import show
from normkit.engine.layer import Layer
from normkit.surgery.calibrate import Calibration
from normkit.surgery.changes import Changes, Refusal, Refusals, label
from normkit.surgery.norms import norms_in, reach, read_norm
from normkit.surgery.select import Where
from normkit.surgery.substitute import build_all, put_heard
from normkit.surgery.target import Target, any_tensor
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import Sight, tensors_in

_TOKENS = (
    *(nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase),
    *(nn.Conv1d, nn.ConvTranspose1d, nn.TransformerDecoderLayer),
)
_IMAGES = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MIXES_TOKENS = re.compile("atten|attn|transformer|causal|mamba|recurrent", re.IGNORECASE)


def may_be_causal(model: nn.Module, example: Any = None) -> bool:
    """Whether a position of a model's input may be forbidden to see later ones.

    With an example: unless that is images alone. Without: where the model embeds tokens, is recurrent or convolves along one
    axis, or has attention and takes no images. A model of linear layers on features has no positions.
    """
    given = list(tensors_in(example))
    if given:
        return not all(tensor.dim() == 4 and tensor.is_floating_point() for tensor in given)
    kinds = {type(module) for module in model.modules()}
    if any(issubclass(kind, _TOKENS) for kind in kinds):
        return True
    mixes = any(_MIXES_TOKENS.search(kind.__name__) for kind in kinds)
    return mixes and not any(issubclass(kind, _IMAGES) for kind in kinds)


def time_first(model: nn.Module) -> set[int]:
    """The ids of modules whose input has time on axis 0: those in torch's transformers made without ``batch_first``."""
    found: set[int] = set()
    for module in model.modules():
        layer = module
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
            layer = next(iter(module.layers), module)  # pyright: ignore[reportArgumentType]
        known = isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        if known and not layer.self_attn.batch_first:  # pyright: ignore[reportAttributeAccessIssue]
            found |= {id(child) for child in module.children()}
    return found


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

    Known are the norms of torch.nn and of normkit, and classes whose name contains "norm" and whose output on random inputs is
    that of layer or RMS normalization with gain ``weight`` or ``1 + weight``, as LayerNorm2d and the norms of Hugging Face. Kept
    are gain and bias (the very parameters), eps, momentum, dtype, device, training flag, ``requires_grad``, hooks, what the user
    set (``qconfig``), and that one module stands in several places. The row says what is dropped and what is created, and where
    a norm of each position becomes one over positions, through which tokens of a causal model see later ones. A norm that is of
    the kind already is left as it is, whoever made it.

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

    Raises:
        NotationError: ``to`` or ``where`` can't be read.
        OptionError: another ``on_refusal``.
        SurgeryError: a norm can't be read or replaced, or there is none; the model is left as it was.

    Reference: The forms of layer normalization in convolutional networks follow Wu and He, "Group Normalization"
    (2018), https://arxiv.org/abs/1803.08494, where layer normalization is group normalization with one group.

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

    def make(name: str, module: nn.Module, sight: Sight | None) -> tuple[nn.Module, str] | None:
        seen = None if sight is None else sight.shapes.get(id(module))
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


# The method: the cell's word, torch's layer and its cell, and ours.
RECURRENT: dict[str, tuple[str, type[nn.RNNBase], type[nn.RNNCellBase], type[nn.Module]]] = {
    "layer_norm_lstm": ("lstm", nn.LSTM, nn.LSTMCell, LayerNormLSTMCell),
    "layer_norm_gru": ("gru", nn.GRU, nn.GRUCell, LayerNormGRUCell),
    "layer_norm_rnn": ("rnn", nn.RNN, nn.RNNCell, LayerNormRNNCell),
}


def convert_recurrent(
    model: nn.Module,
    to: str,
    where: Where | None,
    example: Any,
    refusals: Refusals,
    optimizer: torch.optim.Optimizer | None,
) -> Changes:
    """Put layer-normalized recurrent layers in the place of torch's of the same kind; see ``convert``."""
    _, stack, cell, _ = RECURRENT[to]
    found = {name: module for name, module in model.named_modules() if isinstance(module, stack | cell)}
    if not found:
        raise SurgeryError(f"the model has no {stack.__name__} and no {cell.__name__} to convert to {to}")
    note = (
        "weights carried over, norms begin fresh: train before use"
        + "; rows of z negated, an optimizer's state of these weights restarts" * (stack is nn.GRU)
    )

    def make(name: str, module: nn.Module, sight: Sight | None) -> tuple[nn.Module, str]:
        return _build(label(name), module, to), note

    pairs, rows = build_all(model, found, where, example, make, refusals)
    for name, (old, new) in pairs.items():
        rows[name] = replace(rows[name], before=_sizes(old), after=_sizes(new))
    with transaction(model, optimizer) as opened:
        root = put_heard(model, pairs, rows, example, refusals)
        return opened.close(root, rows.values(), refusals)


def _sizes(layer: Any) -> str:
    return f"{type(layer).__name__}({layer.input_size}, {layer.hidden_size})"


def _build(who: str, module: nn.Module, to: str) -> nn.Module:
    kind, stack, _, cell = RECURRENT[to]
    if parametrize.is_parametrized(module):
        raise SurgeryError(f"{who}: its weights are parametrized; bake them in with fold(model) first")
    extra = {
        "bidirectional": "runs both ways",
        "proj_size": "projects its state",
        "dropout": "drops between its layers",
    }
    for option, what in extra.items():
        if getattr(module, option, 0):
            raise SurgeryError(f"{who}: it {what} ({option}={getattr(module, option)}), which {to} has no place for")
    like: Any = module
    if not isinstance(module, stack):
        made = cell(like.input_size, like.hidden_size, **_options(like, like.weight_ih, kind))
        _carry(made, like.weight_ih, like.weight_hh, like.bias_ih, like.bias_hh)
        return made
    options = _options(like, like.weight_ih_l0, kind)
    options["batch_first"] = like.batch_first
    made = LayerNormRecurrent(like.input_size, like.hidden_size, kind, like.num_layers, **options)
    for number, each in enumerate(made.cells):
        keys = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        _carry(each, *(getattr(module, f"{key}_l{number}", None) for key in keys))
    return made


def _options(module: Any, weight: Tensor, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if kind == "lstm":
        return {**options, "bias": bool(module.bias)}
    return {**options, "nonlinearity": module.nonlinearity} if kind == "rnn" else options


@torch.no_grad()
def _carry(cell: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any = None, bias_hh: Any = None) -> None:
    """Give a cell a layer's weights, the very parameters but for a GRU's, and its biases, where the formula has them."""
    cell.weight_ih, cell.weight_hh = weight_ih, weight_hh
    if isinstance(cell, LayerNormGRUCell):  # z opens to the new value here, to the old one in torch
        both = (nn.Parameter(_turned(cell, w), w.requires_grad) for w in (weight_ih, weight_hh))
        cell.weight_ih, cell.weight_hh = both
    if bias_ih is None:
        return
    if isinstance(cell, LayerNormLSTMCell):
        assert cell.bias is not None
        cell.bias.copy_(bias_ih + bias_hh)
    elif isinstance(cell, LayerNormRNNCell):
        cell.norm.bias.copy_(bias_ih + bias_hh)  # pyright: ignore[reportOptionalMemberAccess]
    else:
        two = 2 * cell.hidden_size
        gates, (_, new), (_, old) = _turned(cell, bias_ih + bias_hh)[:two], bias_ih.split(two), bias_hh.split(two)
        for norm, bias in ((cell.norm_ih, gates), (cell.norm_in, new), (cell.norm_hn, old)):
            norm.get_parameter("bias").copy_(bias)


def _turned(cell: Any, rows: Tensor) -> Tensor:
    r, z, n = rows.detach().chunk(3)
    return torch.cat([r, -z, n])
