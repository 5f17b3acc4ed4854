"""Run a rule on the requested back end, or on the best one that can."""

import math
from functools import partial

import torch
from torch import Tensor

from normkit.core.compensation import Affine
from normkit.core.errors import NotationError, OptionError
from normkit.core.memory import RunningStatistics
from normkit.core.moments import Moments, accumulation_dtype, moments
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.engine import native
from normkit.engine.call import Activation, Backend, Call, Output
from normkit.engine.choose import Choice, Explanation, backends, choose, kept

__all__ = ["Activation", "Backend", "Explanation", "backends", "explain", "measure", "normalize", "run", "run_measured"]


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
        rule: the rule to run.
        x: the input, of the rule's axes.
        weight: one value per element of the compensation's axes, or None.
        bias: likewise.
        running: the running statistics of a rule with memory. In training they are updated in place; otherwise they are used
            instead of the input's own.
        training: whether the input's own statistics are used. Without ``running`` they always are.
        mask: boolean, broadcasts over x; elements where it is False enter no statistic and become zero.
        activation: fused activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or None.
        backend: ``"auto"`` chooses; a back end by name runs or raises, without falling back to another.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        ShapeError: the input or a parameter does not fit the rule.
        BackendError: the back end asked for can't run this, with the reason.
        OptionError: there is no such back end or activation, or the input is not floating.

    >>> rule = Rule(Support("* d", over="d"), Statistic(None, "rms", 0.0), Affine("d"))
    >>> run(rule, torch.tensor([[3.0, 4.0]]), weight=torch.tensor([1.0, 2.0]))
    tensor([[0.8485, 2.2627]])
    """
    own = training or running is None
    return perform(Call(rule, x, weight, bias, None, running, own, mask, activation, False, backend)).y


def run_measured(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Moments]:
    """Run a centred rule by the input's own statistics, and return its moments too, of size 1 along reduced axes.

    >>> y, found = run_measured(Rule(Support("n c", over="n")), torch.tensor([[1.0], [3.0]]))
    >>> found.mean, found.var.round(decimals=4), found.n
    (tensor([[2.]]), tensor([[1.]]), 2)
    """
    y, _, found, _ = perform(Call(rule, x, weight, bias, mask=mask, measured=True, backend=backend))
    if found is None:
        raise OptionError(f"{rule.formula()} has no moments to return; use a centred statistic")
    return y, Moments(found.mean.detach(), found.var.detach(), found.n)


def measure(rule: Rule, x: Tensor, *, mask: Tensor | None = None, backend: Backend = "auto") -> Moments:
    """Return the moments of a centred rule's sets alone, without gradients, with reduced axes of the rule's split of size 1.

    >>> measure(Rule(Support("n c", over="n")), torch.tensor([[1.0], [3.0]]))
    Moments(mean=tensor([[2.]]), var=tensor([[1.]]), n=2)
    """
    call = Call(rule, x.detach(), mask=mask, measured=True, backend=backend)
    choice = kept(call, call.key())
    if choice.backend == "native" and isinstance(choice.perform, partial):
        return native.measure(choice.perform.args[0], call.x)
    shape, dims = choice.split.shape, choice.split.dims
    return moments(call.x.reshape(shape), dims, None if mask is None else mask.expand(x.shape).reshape(shape))


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

    Arguments and errors are those of ``run``; ``measured`` says that the statistics are wanted too, as by ``run_measured``. Print
    what is returned.

    >>> print(explain(Rule(Support("n c *", over="c"), Statistic(None, "rms")), torch.zeros(2, 8, 5, 5), backend="closed"))
    y = x / sqrt(E[x^2] + eps)
    n c * over c: one statistic for each of 2 samples x 25 positions = 50, over 8 channels
    statistics in float32; back end: closed, PyTorch operators with the backward pass in closed form
    because it was asked for by name
    """
    own = training or running is None
    return explained(Call(rule, x, weight, bias, None, running, own, mask, activation, measured, backend))


def explained(call: Call) -> Explanation:
    """Explain the choice for a call."""
    choice, rule, x = choose(call), call.rule, call.x
    support = str(rule.support) if x.is_nested else rule.support.explain(x.shape)
    tensor = "" if call.save == "input" else _kept_tensor(choice, call)
    return Explanation(choice.backend, choice.why, rule.formula(), support, accumulation_dtype(x.dtype), tensor)


def _kept_tensor(choice: Choice, call: Call) -> str:
    """What a call that asks to keep its output keeps, and why if that is its input."""
    perform = choice.perform
    if isinstance(perform, partial) and perform.func is native.perform and perform.args[0].output:
        return "its output"
    if not call.own:
        return "its input (by given statistics)"
    return (
        "its input (the output is kept by normkit's kernel alone, without torch's operators, transforms or a compiler)"
    )


def perform(call: Call) -> Output:
    """Run a call, and update its running statistics if it has any."""
    return perform_by(kept(call, call.key()), call)


def perform_by(choice: Choice, call: Call) -> Output:
    """Run a call by the choice made for it, or for another call with the same key."""
    output = choice.perform(call)
    # The native kernels may have updated the statistics already; all other back ends leave that to here.
    memory, running, found = call.rule.memory, call.running, output.moments
    if running is not None and memory is not None and call.own and not output.remembered and found is not None:
        memory.update(running, found, choice.split)
    return output


def quantize(call: Call) -> tuple[Tensor, Tensor]:
    """The output as int8, and a scale for each row of its last axis; called without gradients."""
    choice = kept(call, call.key())
    if isinstance(choice.perform, partial) and choice.perform.func is native.perform:
        ready = choice.perform.args[0]
        if native.by_rows(ready, call.x):
            return native.quantize(ready, call.x, call.weight, call.bias)
    return in_whole_numbers(perform_by(choice, call).y)


def in_whole_numbers(y: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor as int8, and a scale for each row of its last axis."""
    y = y.float()
    most = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros((*y.shape[:-1], 1))
    most = torch.where(most.isfinite(), most, math.nan)
    factor = torch.where(most == 0, 0.0, 127 / most)
    return (y * factor).round().nan_to_num().to(torch.int8), most / 127


def normalize(
    input: Tensor,
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
        input: of the support's axes.
        support: which elements share a statistic.
        weight: one value per element of the axes ``per``, or None.
        bias: likewise.
        per: the axes of weight and bias in the notation of Support, e.g. ``"c"``; needed only with them.
        statistic: the centre and the scale; default mean and standard deviation with eps 1e-5.
        mask: boolean, broadcasts over x; elements where it is False enter no statistic and become zero.
        backend: as for ``run``.

    Returns:
        A tensor of the input's shape and dtype; differentiable any number of times.

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
    return run(_rule(support, statistic or Statistic(), per), input, weight, bias, mask=mask, backend=backend)


@remembered
def _rule(support: Support, statistic: Statistic, per: str | None) -> Rule:
    return Rule(support, statistic, None if per is None else Affine(per))
