"""The audit and its table of checks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.diagnostics.audit import parameters, running, statistics
from normkit.diagnostics.audit.causality import acausal_statistic
from normkit.diagnostics.audit.finding import SEVERITIES, Audit, Finding
from normkit.diagnostics.audit.observe import as_it_was, observe, prepare

CHECKS = (
    *(statistics.one_element, acausal_statistic, statistics.small_batch, statistics.large_mean),
    *(statistics.shared_batch_norm, statistics.checkpointed_batch_norm, statistics.dead_channels),
    *(statistics.attention_logits, statistics.layout_copy),
    *(running.running_not_finite, running.running_tiny, running.running_stale, running.running_of_old_scale),
    *(running.waking_batch_norm, parameters.gain_convention, parameters.zero_rows, parameters.decayed_norm),
    *(parameters.vanishing_eps, parameters.cancelled_bias),
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
        batch: one, as in training: a tensor, a dict of arguments by name, or a tuple of arguments, of which the first alone is
            given where ``model.forward`` does not take as many, as of (inputs, targets).
        optimizer: of the model's parameters, whose weight decay is looked at. Default: None.
        loss: ``loss(outputs, batch)``, a number, of the whole batch as it was given. Default: the mean squared distance of the
            first floating tensor of the outputs from random numbers.
        forward: ``forward(model, batch)`` runs the model, in place of the above. Default: None.

    Returns the findings, the most severe first; empty if nothing was found.

    Raises:
        OptionError: a parameter has no size yet, the batch is a ``DataLoader``, or the optimizer has none of the parameters.
        Exception: whatever the model raises on the batch.

    Reference: Ioffe and Szegedy (2015), https://arxiv.org/abs/1502.03167, section 3.2, for the bias; Wu and He (2018),
    https://arxiv.org/abs/1803.08494, figure 1, for small batches; Henry et al. (2020),
    https://arxiv.org/abs/2010.04245, for attention's logits.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> (found,) = audit(model, torch.randn(16, 3, 8, 8))
    >>> found.kind, found.module, found.evidence["biases"]
    ('cancelled_bias', '0', 8)
    >>> print(found.fix())
    layer  before  after    note
    0      bias    no bias  BatchNorm2d(8) cancels it
    """
    seen = prepare(model, batch, optimizer, forward)
    with as_it_was(model):
        observe(seen, loss)
    found = []
    for each in CHECKS:
        for name, evidence, fix in each.find(seen):
            found.append(Finding(each.kind, name, evidence, each.severity, each.cure, fix))
    return Audit(found, seen.notes)


def table() -> str:
    """The kinds of findings as a table of Markdown, for the documentation."""
    lines = ["| kind | severity | found | cure | `fix()` keeps |", "|---|---|---|---|---|"]
    for each in sorted(CHECKS, key=lambda each: -SEVERITIES.index(each.severity)):
        said = (each.find.__doc__ or "").strip()
        lines.append(f"| `{each.kind}` | {each.severity} | {said} | {each.cure} | {each.keeps or 'no fix'} |")
    return "\n".join(lines)
