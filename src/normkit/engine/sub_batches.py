"""Run a rule on sub-batches of a batch, each by its own statistics."""

from dataclasses import replace

import torch
from torch import Tensor

from normkit.core.moments import Moments
from normkit.core.rule import Rule
from normkit.engine.dispatch import Backend, Explanation, explain, run_measured


def run_in_sub_batches(
    rule: Rule,
    whole: Rule,
    size: int,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Moments]:
    """Run a rule on consecutive sub-batches of ``size``, the last of which may be smaller; the moments have a row for each.

    A last sub-batch with one value per statistic, whose variance would be undefined, joins the one before it. The rule splits the
    batch axis as ``(b n)``; ``whole`` is the same with ``n``.
    """
    batch, body = x.shape[0], _body(whole, size, x)
    if mask is not None:
        mask = mask.expand(x.shape)
    parts = [(rule, body)] if body else []
    if body < batch or batch == 0:
        parts.append((whole, batch - body))
    sizes = [samples for _, samples in parts]
    # By split, and not at all where there is one part: the gradient of a slice loses the memory format.
    pieces = [x] if len(parts) == 1 else x.split(sizes)
    masks = [None] * len(parts) if mask is None else mask.split(sizes)
    outputs, tables = [], []
    for (part, _), piece, here in zip(parts, pieces, masks, strict=True):
        y, found = run_measured(part, piece, weight, bias, mask=here, backend=backend)
        tables.append([_table(value, body // size if part is rule else 1, found.mean) for value in found])
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return y, Moments(*(values[0] if len(values) == 1 else torch.cat(values) for values in zip(*tables, strict=True)))


def explain_in_sub_batches(
    rule: Rule, whole: Rule, size: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: Backend
) -> Explanation:
    """Explain what ``run_in_sub_batches`` would use; of a batch that does not divide, for its full sub-batches."""
    body = _body(whole, size, x)
    if not body:
        return explain(whole, x, weight, bias, measured=True, backend=backend)
    found, rest = explain(rule, x[:body], weight, bias, measured=True, backend=backend), len(x) - body
    return replace(found, why=f"{found.why}; the last {rest} samples form another sub-batch") if rest else found


def _body(whole: Rule, size: int, x: Tensor) -> int:
    """How many samples are in sub-batches of the full size."""
    batch = x.shape[0]
    body = batch // size * size if batch > size else 0
    # A remainder of one sample has one value per statistic where there are no positions.
    alone = body and batch - body == 1 and whole.support.split((1, *x.shape[1:])).count == 1
    return body - size if alone else body


def _table(value: Tensor | int, rows: int, like: Tensor) -> Tensor:
    columns = like.numel() // rows
    if not isinstance(value, Tensor):
        return torch.full((rows, columns), float(value), dtype=like.dtype, device=like.device)
    return value.expand(like.shape).reshape(rows, columns)
