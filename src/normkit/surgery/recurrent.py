"""Recurrent layers of torch to layer-normalized ones: the weights go over, the norms begin fresh."""

from collections.abc import Sequence
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
from normkit.core.errors import SurgeryError
from normkit.surgery.changes import Changes, Refusals, label
from normkit.surgery.select import Where
from normkit.surgery.substitute import build_all, put_heard
from normkit.surgery.transaction import transaction

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

    def make(name: str, module: nn.Module, seen: Sequence[int] | None) -> tuple[nn.Module, str]:
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
    made = LayerNormRecurrent(
        like.input_size, like.hidden_size, kind, like.num_layers, batch_first=like.batch_first, **options
    )
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
        cell.weight_ih, cell.weight_hh = (
            nn.Parameter(_turned(cell, w), w.requires_grad) for w in (weight_ih, weight_hh)
        )
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
