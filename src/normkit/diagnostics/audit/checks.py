"""The audit and its table of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.diagnostics.audit import parameters, running, statistics
from normkit.diagnostics.audit.causality import acausal
from normkit.diagnostics.audit.finding import SEVERITIES, Audit, Finding, Severity
from normkit.diagnostics.audit.observe import Observed, as_it_was, observe, prepare
from normkit.diagnostics.audit.statistics import Row

Keeps = Literal["", "training", "evaluation", "both"]


@dataclass(frozen=True)
class Check:
    """One kind of mistake.

    Args:
        kind: its name in findings.
        severity: of its findings.
        find: yields module, evidence and fix of each.
        cure: what to do, on one line.
        keeps: which function of the model ``fix`` keeps to rounding: in training, in evaluation, or both; "" for no fix.
    """

    kind: str
    severity: Severity
    find: Callable[[Observed], Iterator[Row]]
    cure: str
    keeps: Keeps = ""


CHECKS = (
    Check(
        "one_element",
        "error",
        statistics.one_element,
        "normalize over more: larger inputs or batches, fewer groups, or a norm over channels, as convert(model, 'ln')",
    ),
    Check(
        "acausal_statistic",
        "error",
        acausal,
        "normalize each token by itself: convert(model, 'ln') or 'rms'",
    ),
    Check(
        "running_not_finite",
        "error",
        running.not_finite,
        "find the batch that overflowed, then recalibrate(model, batches)",
        "training",
    ),
    Check(
        "gain_convention",
        "error",
        parameters.gain_convention,
        "load the checkpoint into the norm that it was trained with: one multiplies by w, the other by 1 + w",
    ),
    Check(
        "zero_rows",
        "error",
        parameters.zero_rows,
        "give the rows a direction, as by a fresh draw, or remove the parametrization from them",
    ),
    Check(
        "small_batch",
        "warning",
        statistics.small_batch,
        "audit with the batch of training; if it is this one, convert(model, 'gn') or synchronize the batch norms",
    ),
    Check(
        "large_mean",
        "warning",
        statistics.large_mean,
        "subtract the mean earlier, in float32, or run this norm in a wider dtype",
    ),
    Check(
        "running_tiny",
        "warning",
        running.tiny,
        "prune the channel, or raise eps above the noise; recalibrate(model, batches) if it is alive",
    ),
    Check(
        "running_stale",
        "warning",
        running.stale,
        "recalibrate(model, batches) before evaluation",
        "training",
    ),
    Check(
        "running_of_old_scale",
        "warning",
        running.old_scale,
        "condition(model) carries running statistics along; else recalibrate(model, batches)",
        "training",
    ),
    Check(
        "shared_batch_norm",
        "warning",
        statistics.shared,
        "give each place a batch norm of its own",
    ),
    Check(
        "checkpointed_batch_norm",
        "warning",
        statistics.checkpointed,
        "leave it out of the checkpointed part, or set momentum to 1 - sqrt(1 - momentum)",
    ),
    Check(
        "waking_batch_norm",
        "warning",
        running.waking,
        "surgery.freeze(model) holds it through train()",
        "evaluation",
    ),
    Check(
        "decayed_norm",
        "warning",
        parameters.decayed,
        "make the optimizer of surgery.param_groups(model, weight_decay)",
        "both",
    ),
    Check(
        "dead_channels",
        "warning",
        statistics.dead,
        "reset the biases of these channels, or prune them; a lower learning rate keeps others alive",
    ),
    Check(
        "attention_logits",
        "warning",
        statistics.attention_logits,
        "normalize queries and keys, as by QueryKeyNorm, or lower the learning rate of their projections",
    ),
    Check(
        "vanishing_eps",
        "warning",
        parameters.vanishing_eps,
        "raise eps to what the dtype of the computation can hold, 1e-6 in half types",
        "both",
    ),
    Check(
        "cancelled_bias",
        "info",
        parameters.cancelled_bias,
        "bias=False, or surgery.drop_redundant_bias(model, batch)",
        "both",
    ),
    Check(
        "layout_copy",
        "info",
        statistics.layout_copy,
        "keep one memory format: LayerNorm(C, over='c') on channels-first input, or accelerate(model)",
        "both",
    ),
)


def audit(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Audit:
    """Find normalization mistakes by one forward and one backward pass, in training mode and without dropout.

    Norms are recognized by their class or by what they compute, as ``convert`` recognizes them. Where a norm may reach over
    the positions of a sequence, three more forward passes see whether tokens get to know later ones. Model, optimizer and
    random generators are left as they were, bit for bit; the model's own hooks run.

    Args:
        model: any module, without lazy parameters.
        batch: as in training: a tensor, a dict of arguments by name, or a tuple of arguments, of which the first alone is given
            where ``model.forward`` does not take as many, as of (inputs, targets).
        optimizer: whose weight decay is looked at. Default: None.
        loss: ``loss(outputs, batch)``, a number. Default: the mean squared distance of the first floating tensor of
            the outputs from random numbers.
        forward: ``forward(model, batch)`` runs the model, in place of the above. Default: None.

    Returns:
        The findings, the most severe first; empty if nothing was found.

    Raises:
        OptionError: a parameter has no size yet.
        Exception: whatever the model raises on the batch.

    Reference:
        Ioffe and Szegedy (2015), https://arxiv.org/abs/1502.03167, section 3.2, for the bias; Wu and He (2018),
        https://arxiv.org/abs/1803.08494, figure 1, for small batches; Henry et al. (2020), https://arxiv.org/abs/2010.04245, for
        attention's logits.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> (found,) = audit(model, torch.randn(16, 3, 8, 8))
    >>> found.kind, found.module, found.evidence["biases"]
    ('cancelled_bias', '0', 8)
    >>> print(found.fix())
    layer  before  after    note
    0      bias    no bias  BatchNorm2d(8) cancels it
    >>> print(audit(model, torch.randn(16, 3, 8, 8)))
    nothing found
    """
    seen = prepare(model, batch, optimizer, forward)
    with as_it_was(model):
        observe(seen, loss)
    rows = []
    for check in CHECKS:
        for name, evidence, fix in check.find(seen):
            rows.append(Finding(check.kind, name, evidence, check.severity, check.cure, fix if check.keeps else None))
    rows.sort(key=lambda row: -SEVERITIES.index(row.severity))
    return Audit(tuple(rows), tuple(seen.notes))


def table() -> str:
    """The kinds of findings as a table of Markdown, for the documentation."""
    lines = ["| kind | severity | found | cure | `fix()` keeps |", "|---|---|---|---|---|"]
    for check in CHECKS:
        said = (check.find.__doc__ or "").strip()
        lines.append(f"| `{check.kind}` | {check.severity} | {said} | {check.cure} | {check.keeps or 'none'} |")
    return "\n".join(lines)
