"""Checks of parameters: biases without effect, decayed or misread gains, rows and eps of zero."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.catalogue.citation import card_of
from normkit.core.moments import accumulation_dtype
from normkit.diagnostics.audit.observe import Observed, Seen, as_it_was
from normkit.diagnostics.audit.statistics import Row
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.decay import param_groups
from normkit.surgery.from_one import FromOne
from normkit.surgery.norms import describe
from normkit.surgery.redundant_bias import drop_redundant_bias
from normkit.surgery.transaction import transaction
from normkit.weights.layout import hooked_weight, weight_layout

# Over the channels, the gradients of a bias that counts add up to a hundredth of their absolute values or more.
_NOTHING = 1e-4
_DIVIDE = ("weight_norm", "weight_conditioning", "weight_standardization", "scaled_weight_standardization")
_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")


def cancelled_bias(seen: Observed) -> Iterator[Row]:
    """Biases whose gradient is zero, as the norm behind subtracts what they add."""
    for norm in seen.norms:
        if norm.layer is None or norm.cancelled is None or any(call.dtype.itemsize < 4 for call in norm.calls):
            continue
        name, layer = norm.layer
        bias = layer._parameters.get("bias")
        if bias is not None and bias.requires_grad and norm.cancelled < _NOTHING:
            drop = partial(drop_redundant_bias, seen.model, seen.example, optimizer=seen.optimizer)
            numbers = {"gradient_sum_over_absolute": norm.cancelled, "biases": bias.numel()}
            yield label(name), numbers, None if seen.example is None else drop


def decayed(seen: Observed) -> Iterator[Row]:
    """Gains and biases of norms that weight decay pulls to zero."""
    if seen.optimizer is None:
        return
    of_norms = next((group for group in param_groups(seen.model, 0.0) if group["name"] == "norms"), None)
    if of_norms is None:
        return
    around_one = {id(norm.norm.weight) for norm in seen.norms if norm.norm is not None and norm.norm.offset}
    for module in seen.model.modules():
        if parametrize.is_parametrized(module):
            lists = module.get_submodule("parametrizations").children()
            around_one |= {
                id(parts.original) for parts in lists if any(isinstance(p, FromOne) for p in parts.children())
            }
    names = dict(zip(map(id, of_norms["params"]), of_norms["param_names"], strict=True))
    for group in seen.optimizer.param_groups:
        decay = group.get("weight_decay", 0)
        mine = [p for p in group["params"] if id(p) in names and id(p) not in around_one]
        if decay and mine:
            first = names[id(mine[0])].rpartition(".")[0]
            numbers = {"weight_decay": float(decay), "parameters": len(mine)}
            yield label(first), numbers, partial(_part, seen.model, seen.optimizer, group, mine)


def vanishing_eps(seen: Observed) -> Iterator[Row]:
    """Norms that give NaN or infinity for an input of zeros, as padding and dead channels are."""
    for norm in seen.norms:
        if not norm.calls:
            continue
        call = norm.calls[0]
        like = next(norm.module.parameters(), next(norm.module.buffers(), torch.empty(0)))
        zeros = torch.zeros((min(2, call.shape[0]), *call.shape[1:]), dtype=call.dtype, device=like.device)
        with as_it_was(norm.module), torch.no_grad():
            try:
                output = norm.module(zeros)
            except Exception:  # a norm of several inputs, or of another number of rows: nothing is known then
                continue
        wrong = int((~output.isfinite()).sum()) if isinstance(output, Tensor) else 0
        if wrong:
            eps = next((key for key in _EPS_NAMES if isinstance(vars(norm.module).get(key), float)), None)
            value = 0.0 if eps is None else float(getattr(norm.module, eps))
            fix = None if eps is None else partial(_raise_eps, seen.model, norm, eps, call.dtype)
            yield norm.label, {"eps": value, "not_finite": wrong}, fix


def gain_convention(seen: Observed) -> Iterator[Row]:
    """Gains near 0 of norms that multiply by w, or near 2 of norms that multiply by 1 + w."""
    kinds: dict[tuple[type[nn.Module], float], list[tuple[Seen, Tensor]]] = {}
    for norm in seen.norms:
        own = norm.norm
        if own is not None and own.weight is not None and own.kind in ("layer_norm", "rms_norm"):
            kinds.setdefault((type(norm.module), own.offset), []).append((norm, own.weight.detach().float()))
    for (_, offset), members in kinds.items():
        median = float(torch.stack([weight.median() for _, weight in members]).median()) + offset
        below = sum(int((weight < 0).sum()) for _, weight in members) / sum(weight.numel() for _, weight in members)
        zero = not offset and not any(weight.any() for _, weight in members)
        # Trained gains may be small, but are of one sign; what counts from 1 is around 0 with both.
        small, twice = not offset and abs(median) < 0.25 and below > 0.2, offset == 1 and 1.7 < median < 2.3
        if zero or small or twice:
            numbers = {"median_gain": median, "share_negative": below, "norms": len(members)}
            yield members[0][0].label, numbers, None


def zero_rows(seen: Observed) -> Iterator[Row]:
    """Rows of zero in a weight that is divided by the norm of its rows."""
    for name, layer in seen.model.named_modules():
        for key, raw, centred in _divided(layer):
            rows = weight_layout(layer, key).matrix(raw.detach()).double()
            rows = rows - rows.mean(1, keepdim=True) if centred else rows
            zero = rows.norm(dim=1) <= torch.finfo(raw.dtype).tiny
            if zero.any():
                yield label(name), {"rows": int(zero.sum()), "of": len(rows), "first": int(zero.nonzero()[0])}, None


def _divided(layer: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    hooked = hooked_weight(layer, "weight")
    if hooked is not None and hooked[0].endswith("weight_norm"):
        yield "weight", hooked[1], False
    if parametrize.is_parametrized(layer):
        for key, parts in layer.get_submodule("parametrizations").named_children():
            cards = [card.name for part in parts.children() if (card := card_of(part)) is not None]
            raw = getattr(parts, "original1" if "weight_norm" in cards else "original", None)
            if any(card in _DIVIDE for card in cards) and isinstance(raw, Tensor) and raw.dim() > 1:
                yield key, raw, any("standardization" in card for card in cards)


def _part(model: nn.Module, optimizer: torch.optim.Optimizer, group: dict[str, Any], mine: list[Tensor]) -> Changes:
    """Give parameters a group of their own without weight decay; their state stays theirs."""
    groups, before = optimizer.param_groups, dict(group)
    ids = {id(parameter) for parameter in mine}
    named = group.get("param_names")
    pairs = list(
        zip(
            group["params"] if named is None else zip(named, group["params"], strict=True), group["params"], strict=True
        )
    )
    group["params"] = [parameter for parameter in before["params"] if id(parameter) not in ids]
    if named is not None:
        group["param_names"] = [given[0] for given, parameter in pairs if id(parameter) not in ids]
    options = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
    own = [given for given, parameter in pairs if id(parameter) in ids]
    optimizer.add_param_group({**options, "params": own, "weight_decay": 0.0})
    added = groups[-1]
    if not group["params"]:
        _without(groups, group)

    def undo() -> nn.Module:
        _without(groups, added)
        if not group["params"]:
            groups.append(group)
        group.update(before)
        return model

    row = Change("(optimizer)", f"weight decay {before['weight_decay']:g}", "0", f"{len(mine)} parameters of norms")
    return Changes(model, (row,), (), {}, undo)


def _without(groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
    groups[:] = [each for each in groups if each is not group]  # equality of groups would compare their tensors


def _raise_eps(model: nn.Module, norm: Seen, key: str, dtype: torch.dtype) -> Changes:
    """Set eps to the rounding of float32, or float64's: an input of unit variance does not see it."""
    with transaction(model) as opened:
        before = getattr(norm.module, key)
        setattr(norm.module, key, torch.finfo(accumulation_dtype(dtype)).eps)
        row = Change(norm.label, f"eps {before:g}", f"eps {getattr(norm.module, key):g}", describe(norm.module))
        return opened.close(model, [row])
