"""Runs a rule on the back end asked for, or on the best one that can; says which and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normkit.core.compensation import Affine
from normkit.core.errors import BackendError, NotationError, OptionError, ShapeError
from normkit.core.memory import Running, RunningStatistics
from normkit.core.moments import Moments, accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Split, Support, per_shape, place, show
from normkit.engine import aten, closed_form, reference

Backend = Literal["auto", "reference", "closed", "aten"]

_WHAT = {
    "reference": "the definition in plain PyTorch",
    "closed": "PyTorch operators with the backward pass in closed form",
    "aten": "torch's own fused kernel",
}


@dataclass(frozen=True)
class Explanation:
    """Which back end runs a rule on an input, why, and what shares a statistic. Prints as text."""

    backend: str
    why: str
    formula: str
    support: str
    accumulation: torch.dtype

    def __str__(self) -> str:
        return (
            f"{self.formula}\n{self.support}\n"
            f"statistics in {str(self.accumulation).removeprefix('torch.')}; back end: {self.backend}, {_WHAT[self.backend]}\n"
            f"because {self.why}"
        )


def backends() -> dict[str, str | None]:
    """The back ends that normkit knows, each with the reason why it can't run here, or None if it can."""
    return dict.fromkeys(_WHAT)


def run(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running: RunningStatistics | None = None,
    training: bool = True,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Run a rule: statistics over its support, normalize, compensate, remember.

    Args:
        rule: what to compute.
        x: the input, of the rule's axes.
        weight: one value per element of the compensation's axes, or None.
        bias: likewise.
        running: the running statistics of a rule with memory. In training they are updated in place; otherwise they are used
            instead of the input's own.
        training: whether the input's own statistics are used. Without ``running`` they always are.
        mask: boolean, broadcasts over x; where it is False the element enters no statistic and comes out as zero.
        backend: ``"auto"`` chooses; a back end by name runs or raises, and never hands over to another.

    Returns:
        Of the input's shape and dtype.

    Raises:
        ShapeError: the input or a parameter does not fit the rule.
        BackendError: the back end asked for can't run this, with the reason.
        OptionError: there is no such back end, or the input is not floating.

    >>> rule = Rule(Support("* d", over="d"), Statistic(None, "rms", 0.0), Affine("d"))
    >>> run(rule, torch.tensor([[3.0, 4.0]]), weight=torch.tensor([1.0, 2.0]))
    tensor([[0.8485, 2.2627]])
    """
    split = rule.support.split(x.shape)
    if running is None:
        return _by_own_statistics(rule, x, split, weight, bias, mask, backend, measured=False)[0]
    if rule.memory is None:
        raise ShapeError("run: running statistics are given, but the rule has no memory; add one, e.g. Running()")
    if not training:
        return _by_given_statistics(rule, rule.memory, x, split, weight, bias, running, mask, backend)
    y, moments = _by_own_statistics(rule, x, split, weight, bias, mask, backend, measured=True)
    if moments is not None:
        rule.memory.update(running, moments, split)
    return y


def run_measured(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Moments]:
    """Run a centred rule by the input's own statistics, and hand them over.

    Args:
        rule: what to compute.
        x: the input.
        weight: as for ``run``.
        bias: as for ``run``.
        mask: as for ``run``.
        backend: as for ``run``.

    Returns:
        The output, and the moments without gradients, reduced axes of the rule's split kept with size 1.

    Raises:
        ShapeError, BackendError, OptionError: as for ``run``; OptionError also where the rule has no moments.

    >>> y, found = run_measured(Rule(Support("n c", over="n")), torch.tensor([[1.0], [3.0]]))
    >>> found.mean, found.var, found.n
    (tensor([[2.]]), tensor([[1.0000]]), 2)
    """
    split = rule.support.split(x.shape)
    y, moments = _by_own_statistics(rule, x, split, weight, bias, mask, backend, measured=True)
    if moments is None:
        raise OptionError(f"{rule.formula()} has no moments to hand over; use a centred statistic")
    return y, Moments(moments.mean.detach(), moments.var.detach(), moments.n)


def _by_own_statistics(
    rule: Rule,
    x: Tensor,
    split: Split,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    backend: str,
    measured: bool,
) -> tuple[Tensor, Moments | None]:
    chosen, _ = _choose(rule, x, split, weight, bias, mask, backend, measured)
    moments: Moments | None
    if chosen == "aten":
        y, moments = aten.normalize(rule, x, split, weight, bias, measured)
    elif chosen == "closed":
        y, _, moments = closed_form.normalize(x.reshape(split.shape), split, rule.statistic)
        if weight is not None or bias is not None:
            assert rule.compensation is not None
            y = rule.compensation.apply(y, split, weight, bias)
        elif y.dtype == x.dtype:
            y = y.clone()  # the backward pass needs it, and a caller may write into what it gets
    else:
        y, moments = reference.normalize(rule, x.reshape(split.shape), split, weight, bias, _split_mask(mask, x, split))
    return y.reshape(x.shape).to(x.dtype), moments


def _by_given_statistics(
    rule: Rule,
    memory: Running,
    x: Tensor,
    split: Split,
    weight: Tensor | None,
    bias: Tensor | None,
    running: RunningStatistics,
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    chosen, _ = _choose(rule, x, split, weight, bias, mask, backend, running=running)
    if chosen == "aten":
        return aten.normalize_by(rule, x, running, weight, bias)
    mean = place(running.mean, memory.per, split)
    var = None if rule.statistic.scale is None else place(running.var, memory.per, split)
    y = reference.normalize_by(rule, x.reshape(split.shape), split, mean, var, weight, bias)
    inside = _split_mask(mask, x, split)
    return (y if inside is None else torch.where(inside, y, 0.0)).reshape(x.shape).to(x.dtype)


def explain(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    measured: bool = False,
    backend: Backend = "auto",
) -> Explanation:
    """Say which back end ``run`` would use for these arguments, and why.

    Args:
        rule: what would be computed.
        x: the input.
        weight: as for ``run``.
        bias: as for ``run``.
        mask: as for ``run``.
        measured: whether the statistics are to be remembered too.
        backend: as for ``run``.

    Returns:
        The choice with its reason; ``print`` it.

    Raises:
        ShapeError, BackendError, OptionError: as ``run`` would.

    >>> print(explain(Rule(Support("n c *", over="c"), Statistic(None, "rms")), torch.zeros(2, 8, 5, 5)))
    y = x / sqrt(E[x^2] + eps)
    n c * over c: one statistic for each of 2 samples x 25 positions = 50, over 8 channels
    statistics in float32; back end: closed, PyTorch operators with the backward pass in closed form
    because torch has no fused kernel for Support("n c *", over="c") with x / sqrt(E[x^2] + eps)
    """
    chosen, why = _choose(rule, x, rule.support.split(x.shape), weight, bias, mask, backend, measured)
    return Explanation(chosen, why, rule.formula(), rule.support.explain(x.shape), accumulation_dtype(x.dtype))


def normalize(
    x: Tensor,
    support: Support,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    per: str | None = None,
    statistic: Statistic | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Normalize over any support set: the one operation behind every method, open to new ones.

    y = weight * (x - E_S[x]) / sqrt(Var_S[x] + eps) + bias

    Args:
        x: the input.
        support: which elements share a statistic.
        weight: one value per element of the axes ``per``, or None.
        bias: likewise.
        per: the axes of weight and bias in the notation of Support, e.g. ``"c"``; needed only with them.
        statistic: the centre and the scale; default mean and standard deviation with eps 1e-5.
        mask: boolean, broadcasts over x; where it is False the element enters no statistic and comes out as zero.
        backend: as for ``run``.

    Returns:
        Of the input's shape and dtype; differentiable any number of times.

    Raises:
        NotationError: ``per`` is missing or names an axis that is not there.
        ShapeError, BackendError, OptionError: as for ``run``.

    Reference:
        Wu and He, "Group Normalization" (2018), https://arxiv.org/abs/1803.08494, section 3.

    >>> x = torch.arange(8.0).view(1, 4, 2)
    >>> normalize(x, Support("n (g c) *", over="c *", g=2))
    tensor([[[-1.3416, -0.4472],
             [ 0.4472,  1.3416],
             [-1.3416, -0.4472],
             [ 0.4472,  1.3416]]])
    """
    if per is None and (weight is not None or bias is not None):
        raise NotationError(
            f'normalize: a weight or bias is given without per=; say which axes it has, e.g. per="{support.names[-1]}"'
        )
    rule = Rule(support, statistic or Statistic(), None if per is None else Affine(per))
    return run(rule, x, weight, bias, mask=mask, backend=backend)


def _choose(
    rule: Rule,
    x: Tensor,
    split: Split,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    backend: str,
    measured: bool = False,
    running: RunningStatistics | None = None,
) -> tuple[str, str]:
    """The back end and the reason for it."""
    accumulation_dtype(x.dtype)  # refuses integers before anything is computed
    for parameter in (weight, bias):
        if parameter is not None and rule.compensation is None:
            raise ShapeError("a weight or bias is given, but the rule has no compensation; add one, e.g. Affine('c')")
        if parameter is None or rule.compensation is None:
            continue
        if parameter.shape != per_shape(rule.compensation.per, split):
            place(parameter, rule.compensation.per, split)  # raises, whatever a back end would make of the shape
    if backend not in ("auto", *_WHAT):
        raise OptionError(f"backend={backend!r}: wanted one of auto, {', '.join(_WHAT)}")
    no_aten = (
        "torch's kernels take no mask"
        if mask is not None
        else aten.refusal(rule, x, split, weight, bias, measured, running)
    )
    no_closed = "the closed form takes no mask" if mask is not None else None
    if no_closed is None and not closed_form.has_closed_form(rule.statistic):
        no_closed = f"no closed backward is known for {rule.statistic.formula()}"
    if no_closed is None and (0 in (x.numel(), len(split.dims)) or split.count <= rule.statistic.correction):
        no_closed = "there is nothing to reduce"
    if backend != "auto":
        reason = {"aten": no_aten, "closed": no_closed}.get(backend)
        if reason is not None:
            raise BackendError(
                f'backend="{backend}" can\'t run {rule.support} on a {show(x.shape)} input: {reason}; use backend="auto"'
            )
        return backend, "it was asked for by name"
    if no_aten is None:
        return "aten", "torch has a fused kernel for these axes and this statistic"
    if torch.compiler.is_compiling():
        return "reference", "the compiler fuses the definition with its neighbours"
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return "reference", "the closed form has no derivative in forward mode"
    if no_closed is None:
        return "closed", no_aten
    return "reference", no_closed


def _split_mask(mask: Tensor | None, x: Tensor, split: Split) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise OptionError(f"mask is {mask.dtype}; wanted torch.bool, True where an element counts, e.g. mask.bool()")
    try:
        return mask.expand(x.shape).reshape(split.shape)
    except RuntimeError:
        raise ShapeError(
            f"mask of shape {show(mask.shape)} does not broadcast over an input of {show(x.shape)}; "
            "give it the same number of axes"
        ) from None
