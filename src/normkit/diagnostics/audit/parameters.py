"""Checks of parameters: biases without effect, decayed or misread gains, rows and eps of zero."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.catalogue.citation import card_of
from normkit.core.moments import accumulation_dtype
from normkit.diagnostics.audit.finding import Row, check
from normkit.diagnostics.audit.observe import Observed, Seen, as_it_was
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.decay import param_groups
from normkit.surgery.norms import FromOne
from normkit.surgery.redundant_bias import drop_redundant_bias
from normkit.surgery.transaction import transaction
from normkit.weights.layout import hooked_weight, weight_layout

# Over the channels, the gradients of a bias that counts add up to a hundredth of their absolute values or more.
_NOTHING = 1e-4
_DIVIDE = ("weight_norm", "weight_conditioning", "weight_standardization", "scaled_weight_standardization")
_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")


@check("info", "bias=False, or surgery.drop_redundant_bias(model, batch)", "both")
def cancelled_bias(seen: Observed) -> Iterator[Row]:
    """Biases whose gradient is zero, as the norm behind subtracts what they add."""
    drop = partial(drop_redundant_bias, seen.model, seen.example, optimizer=seen.optimizer)
    for norm in seen.norms:
        narrow = any(call.dtype.itemsize < 4 for call in norm.calls)  # whose rounding hides a zero
        if norm.layer is not None and norm.cancelled is not None and norm.cancelled < _NOTHING and not narrow:
            name, bias = norm.layer[0], norm.layer[1]._parameters.get("bias")
            if bias is not None and bias.requires_grad:
                numbers = {"gradient_sum_over_absolute": norm.cancelled, "biases": bias.numel()}
                yield label(name), numbers, None if seen.example is None else drop


@check("warning", "make the optimizer of surgery.param_groups(model, weight_decay)", "both")
def decayed_norm(seen: Observed) -> Iterator[Row]:
    """Gains and biases of norms that weight decay pulls to zero."""
    names: dict[int, str] = {}
    for group in param_groups(seen.model, 0.0) if seen.optimizer is not None else ():
        if group["name"] == "norms":
            names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
    around_one = {id(norm.norm.weight) for norm in seen.norms if norm.norm is not None and norm.norm.offset}
    for parts in seen.model.modules():
        if isinstance(parts, parametrize.ParametrizationList) and any(isinstance(p, FromOne) for p in parts):
            around_one.add(id(parts.original))
    for group in [] if seen.optimizer is None else list(seen.optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in names and id(p) not in around_one]
        if mine and (decay := group.get("weight_decay", 0)):
            numbers = {"weight_decay": float(decay), "parameters": len(mine)}
            fix = partial(_spare, seen, group, {id(p) for p in mine})
            yield label(names[id(mine[0])].rpartition(".")[0]), numbers, fix


@check("warning", "raise eps to what the dtype of the computation can hold, 1e-6 in half types", "both")
def vanishing_eps(seen: Observed) -> Iterator[Row]:
    """Norms that give NaN or infinity for an input of zeros, as padding and dead channels are."""
    for norm in seen.norms:
        for call in norm.calls[:1]:
            like = next(norm.module.parameters(), next(norm.module.buffers(), torch.empty(0)))
            zeros = torch.zeros((min(2, call.shape[0]), *call.shape[1:]), dtype=call.dtype, device=like.device)
            with as_it_was(norm.module), torch.no_grad():
                try:
                    wrong = int((~norm.module(zeros).isfinite()).sum())
                except Exception:  # a norm of several inputs, or of another number of rows: nothing is known then
                    continue
            key = next((key for key in _EPS_NAMES if isinstance(vars(norm.module).get(key), float)), None)
            if wrong:
                numbers = {"eps": 0.0 if key is None else getattr(norm.module, key), "not_finite": wrong}
                yield norm.label, numbers, None if key is None else partial(_raise_eps, seen.model, norm, key)


@check("error", "load the checkpoint into the norm that it was trained with: one multiplies by w, the other by 1 + w")
def gain_convention(seen: Observed) -> Iterator[Row]:
    """Gains near 0 of norms that multiply by w, or near 2 of norms that multiply by 1 + w."""
    kinds: dict[tuple[type[nn.Module], float], list[tuple[Seen, Tensor]]] = {}
    for norm in seen.norms:
        own = norm.norm
        if own is not None and own.weight is not None and own.kind in ("layer_norm", "rms_norm"):
            kinds.setdefault((type(norm.module), own.offset), []).append((norm, own.weight.detach().float()))
    for (_, offset), members in kinds.items():
        median = float(torch.stack([weight.median() for _, weight in members]).median()) + offset
        below = float(torch.cat([weight.flatten() for _, weight in members]).lt(0).float().mean())
        zero = not offset and not any(weight.any() for _, weight in members)
        # Trained gains may be small, but are of one sign; what counts from 1 is around 0 with both.
        small, twice = not offset and abs(median) < 0.25 and below > 0.2, offset == 1 and 1.7 < median < 2.3
        if zero or small or twice:
            yield members[0][0].label, {"median_gain": median, "share_negative": below, "norms": len(members)}, None


@check("error", "give the rows a direction, as by a fresh draw, or remove the parametrization from them")
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


def _spare(seen: Observed, group: dict[str, Any], mine: set[int]) -> Changes:
    """Give parameters a group of their own without weight decay; their state stays theirs."""
    assert seen.optimizer is not None
    groups, before, added = seen.optimizer.param_groups, dict(group), []
    keys = [key for key in ("params", "param_names") if key in group]
    rows = list(zip(*(group[key] for key in keys), strict=True))
    apart = [row for row in rows if id(row[0]) in mine]
    if len(apart) == len(rows):
        group["weight_decay"] = 0.0
    else:
        kept = zip(*(row for row in rows if id(row[0]) not in mine), strict=True)
        group.update({key: list(column) for key, column in zip(keys, kept, strict=True)})
        options = {key: value for key, value in group.items() if key not in (*keys, "name")}
        own = [row[::-1] if len(keys) == 2 else row[0] for row in apart]
        seen.optimizer.add_param_group({**options, "params": own, "weight_decay": 0.0})
        added.append(groups[-1])

    def undo() -> nn.Module:
        # By identity: other fixes may have added groups since.
        groups[:] = [each for each in groups if not any(each is one for one in added)]
        group.update(before)
        return seen.model

    row = Change("(optimizer)", f"weight decay {before['weight_decay']:g}", "0", f"{len(apart)} parameters of norms")
    return Changes(seen.model, (row,), (), {}, undo)


def _raise_eps(model: nn.Module, norm: Seen, key: str) -> Changes:
    """Set eps to the rounding of float32, or float64's: an input of unit variance does not see it."""
    with transaction(model) as opened:
        before, eps = getattr(norm.module, key), torch.finfo(accumulation_dtype(norm.calls[0].dtype)).eps
        setattr(norm.module, key, eps)
        return opened.close(model, [Change(norm.label, f"{key} {before:g}", f"{key} {eps:.2g}")])
