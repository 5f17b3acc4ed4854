"""Runs a rule on the back end asked for, or on the best one that can; says which and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from normkit.core.compensation import Affine
from normkit.core.errors import BackendError, NotationError, OptionError, ShapeError
from normkit.core.memory import Running, RunningStatistics
from normkit.core.moments import Moments, accumulation_dtype
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Split, Support, per_shape, place, show
from normkit.engine import aten, closed_form, native, operator, reference
from normkit.engine.eager import traced, watched
from normkit.engine.library import why_not

Backend = Literal["auto", "reference", "closed", "aten", "native"]
Activation = Literal["relu", "silu", "gelu", "gelu_tanh"]

_WHAT = {
    "reference": "the definition in plain PyTorch",
    "closed": "PyTorch operators with the backward pass in closed form",
    "aten": "torch's own fused kernel",
    "native": "normkit's fused CPU kernel",
}


class Choice(NamedTuple):
    """A back end for some arguments, the reason for it, and what it prepared."""

    backend: str
    why: str
    split: Split
    call: native.Prepared | None = None
    ready: aten.Ready | None = None


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
    return {**dict.fromkeys(_WHAT), "native": why_not()}


def run(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running: RunningStatistics | None = None,
    training: bool = True,
    mask: Tensor | None = None,
    activation: Activation | None = None,
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
        activation: what follows, in the same pass: ``"relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or None.
        backend: ``"auto"`` chooses; a back end by name runs or raises, and never hands over to another.

    Returns:
        Of the input's shape and dtype.

    Raises:
        ShapeError: the input or a parameter does not fit the rule.
        BackendError: the back end asked for can't run this, with the reason.
        OptionError: there is no such back end or activation, or the input is not floating.

    >>> rule = Rule(Support("* d", over="d"), Statistic(None, "rms", 0.0), Affine("d"))
    >>> run(rule, torch.tensor([[3.0, 4.0]]), weight=torch.tensor([1.0, 2.0]))
    tensor([[0.8485, 2.2627]])
    """
    return _run(rule, x, weight, bias, None, running, training, mask, activation, backend)[0]


def run_after_sum(
    rule: Rule,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running: RunningStatistics | None = None,
    training: bool = True,
    mask: Tensor | None = None,
    activation: Activation | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run a rule on x + residual, and hand over that sum too: the step between two blocks of a residual network, in one pass.

    Args:
        rule: what to compute.
        x: a branch's output.
        residual: of x's shape and dtype.
        weight: as for ``run``.
        bias: as for ``run``.
        running: as for ``run``.
        training: as for ``run``.
        mask: as for ``run``.
        activation: as for ``run``.
        backend: as for ``run``.

    Returns:
        What ``run`` gives for the sum, and the sum.

    Raises:
        ShapeError: the two differ in shape or dtype; otherwise as for ``run``.

    >>> rule = Rule(Support("* d", over="d"), Statistic(None, "rms", 0.0))
    >>> run_after_sum(rule, torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ShapeError(
            f"residual is {residual.dtype} of {show(residual.shape)}, wanted {x.dtype} of {show(x.shape)} as the input is"
        )
    y, total = _run(rule, x, weight, bias, residual, running, training, mask, activation, backend)
    assert total is not None
    return y, total


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
    >>> found.mean, found.var.round(decimals=4), found.n
    (tensor([[2.]]), tensor([[1.]]), 2)
    """
    choice = _decide(rule, x, weight, bias, mask, None, backend, True, None)
    y, _, found = _by_own_statistics(rule, choice, x, weight, bias, None, mask, None, True)
    found = _moments(choice, found)
    if found is None:
        raise OptionError(f"{rule.formula()} has no moments to hand over; use a centred statistic")
    return y, Moments(found.mean.detach(), found.var.detach(), found.n)


def _run(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStatistics | None,
    training: bool,
    mask: Tensor | None,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    memory = rule.memory
    if running is None:
        choice = _decide(rule, x, weight, bias, mask, activation, backend, False, None)
        y, total, _ = _by_own_statistics(rule, choice, x, weight, bias, residual, mask, activation, False)
        return y, total
    if memory is None:
        raise ShapeError("run: running statistics are given, but the rule has no memory; add one, e.g. Running()")
    if not training:
        total = None if residual is None else x + residual
        x = x if total is None else total
        choice = _decide(rule, x, weight, bias, mask, activation, backend, False, running)
        return _by_given_statistics(rule, memory, choice, x, weight, bias, running, mask, activation), total
    choice = _decide(rule, x, weight, bias, mask, activation, backend, True, None)
    y, total, found = _by_own_statistics(rule, choice, x, weight, bias, residual, mask, activation, True)
    if not _remembered_at_once(memory, choice, found, running, x):
        moments = _moments(choice, found)
        if moments is not None:
            memory.update(running, moments, choice.split)
    return y, total


def _moments(choice: Choice, found: Any) -> Moments | None:
    """The moments in what a back end measured."""
    if choice.call is not None:
        return native.moments(choice.call, found)
    return aten.moments(*found, choice.split) if choice.backend == "aten" else found  # pyright: ignore[reportCallIssue]


def _remembered_at_once(memory: Running, choice: Choice, found: Any, running: RunningStatistics, x: Tensor) -> bool:
    """Whether the library could take what was measured into the running statistics in one call, and has."""
    if choice.call is not None:
        return native.remember(choice.call, memory, found, running)
    if choice.backend != "aten" or _transformed(x):
        return False
    return native.remember_batch(memory, *found, choice.split.count, running)  # pyright: ignore[reportCallIssue]


def _by_own_statistics(
    rule: Rule,
    choice: Choice,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    measured: bool,
) -> tuple[Tensor, Tensor | None, Any]:
    """The output, x + residual if there is one, and what the back end measured, for ``_moments`` to read."""
    split = choice.split
    if choice.call is not None:
        return native.normalize(choice.call, x, weight, bias, residual, measured)
    total = None if residual is None else x + residual
    x = x if total is None else total
    if choice.backend == "native":
        return operator.normalize(rule, x, weight, bias, activation), total, None
    moments: Any
    if choice.ready is not None:
        y, moments = choice.ready(x, weight, bias), None
    elif choice.backend == "aten":
        y, *moments = aten.measure(rule, x, weight, bias)
    elif choice.backend == "closed":
        y, _, moments = closed_form.normalize(x.reshape(split.shape), split, rule.statistic)
        if weight is not None or bias is not None:
            assert rule.compensation is not None
            y = rule.compensation.apply(y, split, weight, bias)
        elif y.dtype == x.dtype:
            y = y.clone()  # the backward pass needs it, and a caller may write into what it gets
    else:
        y, moments = reference.normalize(rule, x.reshape(split.shape), split, weight, bias, _split_mask(mask, x, split))
    return reference.activate(y.reshape(x.shape), activation).to(x.dtype), total, moments


def _by_given_statistics(
    rule: Rule,
    memory: Running,
    choice: Choice,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: RunningStatistics,
    mask: Tensor | None,
    activation: str | None,
) -> Tensor:
    split = choice.split
    if choice.backend == "aten":
        return reference.activate(aten.normalize_by(rule, x, running, weight, bias), activation)
    if choice.call is not None:
        return native.normalize_by(choice.call, x, running.mean, running.var, memory.per, weight, bias)
    mean = place(running.mean, memory.per, split)
    var = None if rule.statistic.scale is None else place(running.var, memory.per, split)
    y = reference.normalize_by(rule, x.reshape(split.shape), split, mean, var, weight, bias)
    inside = _split_mask(mask, x, split)
    y = (y if inside is None else torch.where(inside, y, 0.0)).reshape(x.shape)
    return reference.activate(y, activation).to(x.dtype)


def explain(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running: RunningStatistics | None = None,
    training: bool = True,
    mask: Tensor | None = None,
    activation: Activation | None = None,
    measured: bool = False,
    backend: Backend = "auto",
) -> Explanation:
    """Say which back end ``run`` would use for these arguments, and why.

    Args:
        rule: what would be computed.
        x: the input.
        weight: as for ``run``.
        bias: as for ``run``.
        running: as for ``run``.
        training: as for ``run``.
        mask: as for ``run``.
        activation: as for ``run``.
        measured: whether the statistics are wanted too, as from ``run_measured``.
        backend: as for ``run``.

    Returns:
        The choice with its reason; ``print`` it.

    Raises:
        ShapeError, BackendError, OptionError: as ``run`` would.

    >>> print(explain(Rule(Support("n c *", over="c"), Statistic(None, "rms")), torch.zeros(2, 8, 5, 5), backend="closed"))
    y = x / sqrt(E[x^2] + eps)
    n c * over c: one statistic for each of 2 samples x 25 positions = 50, over 8 channels
    statistics in float32; back end: closed, PyTorch operators with the backward pass in closed form
    because it was asked for by name
    """
    given = running if not training else None
    measured = measured or (running is not None and training)
    choice = _decide(rule, x, weight, bias, mask, activation, backend, measured, given)
    return Explanation(
        choice.backend, choice.why, rule.formula(), rule.support.explain(x.shape), accumulation_dtype(x.dtype)
    )


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
    return run(_rule(support, statistic or Statistic(), per), x, weight, bias, mask=mask, backend=backend)


@remembered
def _rule(support: Support, statistic: Statistic, per: str | None) -> Rule:
    return Rule(support, statistic, None if per is None else Affine(per))


def _decide(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    backend: str,
    measured: bool,
    running: RunningStatistics | None,
) -> Choice:
    """The back end for these arguments, remembered for the next ones like them.

    ``measured`` if the moments are wanted too; ``running`` are the statistics to use in place of the input's own.
    """
    arguments = (rule, x, weight, bias, mask, activation, backend, measured, running)
    if _transformed(x):
        return _choose(*arguments, plain=False)
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        None if weight is None else (weight.shape, weight.dtype),
        None if bias is None else (bias.shape, bias.dtype),
        mask is None,
        activation,
        backend,
        measured,
        None if running is None else running.mean.dtype,
        torch.is_grad_enabled(),
    )
    kept = rule.prepared
    if key not in kept:
        if len(kept) >= 256:  # many shapes, as from ragged batches, must not fill memory
            kept.clear()
        kept[key] = _choose(*arguments, plain=True)
    return kept[key]


def ready(
    rule: Rule, x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str | None, backend: str
) -> aten.Ready | None:
    """The function that runs such arguments, where it is torch's own, which knows itself what to do under its transforms."""
    choice = _decide(rule, x, weight, bias, None, activation, backend, False, None)
    return None if activation is not None else choice.ready


def _transformed(x: Tensor) -> bool:
    """Whether something else than eager PyTorch is at work: what must see each operator, or a subclass of Tensor."""
    return watched() or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)


def _choose(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    backend: str,
    measured: bool,
    running: RunningStatistics | None,
    plain: bool,
) -> Choice:
    """The back end and the reason for it; ``plain`` if nothing but eager PyTorch is at work."""
    split = rule.support.split(x.shape)
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
    reference.check_activation(activation)
    refused: dict[str, str | None] = {"reference": None}
    if mask is not None:
        refused |= dict.fromkeys(("aten", "closed", "native"), "it takes no mask")
    else:
        refused["aten"] = aten.refusal(rule, x, split, weight, bias, measured, running)
        refused["closed"] = _no_closed_form(rule, x, split)
    call = None
    if "native" not in refused:
        if plain:
            prepared = native.prepare(rule, x, split, weight, bias, activation, running is not None)
            call, refused["native"] = (None, prepared) if isinstance(prepared, str) else (prepared, None)
        elif not torch.compiler.is_compiling() or measured or running is not None or _no_closed_form(rule, x, split):
            refused["native"] = "the native kernels do not run under this transform of torch"
        else:
            refused["native"] = operator.refusal(rule, x, weight, bias)
    fused = refused["aten"] is None and not measured and running is None
    ready = aten.prepare(rule, x, split) if fused else None
    if backend != "auto":
        reason = refused[backend]
        if reason is not None:
            raise BackendError(
                f'backend="{backend}" can\'t run {rule.support} on a {show(x.shape)} input: {reason}; use backend="auto"'
            )
        call, ready = call if backend == "native" else None, ready if backend == "aten" else None
        return Choice(backend, "it was asked for by name", split, call, ready)
    if call is not None and not (refused["aten"] is None and aten.is_quicker(rule, x, running is not None)):
        return Choice("native", f"these axes come down to a {call.nest.kind} of its loops", split, call)
    if refused["aten"] is None:
        why = "torch has a fused kernel for these axes and this statistic"
        return Choice("aten", why if call is None else f"{why}, and is faster at this size", split, None, ready)
    if torch.compiler.is_compiling():
        return Choice("reference", "the compiler fuses the definition with its neighbours", split)
    if traced():
        return Choice("reference", "the closed form has no derivative in forward mode", split)
    if refused["closed"] is None:
        return Choice("closed", f"{refused['native']}, and {refused['aten']}", split)
    return Choice("reference", refused["closed"], split)


def _no_closed_form(rule: Rule, x: Tensor, split: Split) -> str | None:
    if not closed_form.has_closed_form(rule.statistic):
        return f"no closed backward is known for {rule.statistic.formula()}"
    if 0 in (x.numel(), len(split.dims)) or split.count <= rule.statistic.correction:
        return "there is nothing to reduce"
    return None


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
