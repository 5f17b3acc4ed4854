"""Batch/group normalization: groups of channels over groups of examples, and inference that weights the example itself."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError
from normkit.core.memory import RunningMoments
from normkit.core.moments import Moments, accumulation_dtype, moments
from normkit.core.place import Place, groups, positive_number
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, check_groups, place
from normkit.engine.dispatch import Backend, Explanation, explain, measure, run, run_measured
from normkit.engine.layer import Layer, check_channels, check_layout, check_several
from normkit.engine.sub_batches import explain_in_sub_batches, run_in_sub_batches


@remembered
def batch_group_norm_rule(
    num_groups: int | None = None, examples_per_group: int | None = None, eps: float = 1e-5, layout: str = "n c *"
) -> Rule:
    """Batch/group normalization of a batch that divides into groups of examples, as data."""
    layout, sizes = check_layout("BatchGroupNorm", layout), {}
    if num_groups is not None:
        layout, sizes["g"] = layout.replace("c", "(g c)"), num_groups
    if examples_per_group not in (None, 1):
        layout, sizes["n"] = layout.replace("n", "(b n)"), examples_per_group
    over = ("" if examples_per_group == 1 else "n ") + ("" if num_groups is None else "c ") + "*"
    per = "c" if num_groups is None else "(g c)"
    return Rule(Support(layout, over=over, **sizes), Statistic("mean", "std", eps), Affine(per))


class BatchGroupNorm(Layer):
    """Normalize groups of channels over groups of examples; at inference, mix in the example's own moments.

    In training, y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias, E and Var over ``examples_per_group`` consecutive examples,
    the channels of a group and all positions. Special cases are

    ==============  ======================  ============================================
    ``num_groups``  ``examples_per_group``  is
    ==============  ======================  ============================================
    None (C)        None (the batch)        batch normalization
    None (C)        some                    ghost batch normalization
    None (C)        1                       instance normalization
    G               1                       group normalization
    1               1                       layer normalization over each sample
    ==============  ======================  ============================================

    In evaluation, the example's own raw moments over its positions are mixed with running averages of raw moments,

        mean = alpha E[x] + (1 - alpha) m1,    var = alpha E[x^2] + (1 - alpha) m2 - mean^2,

    then averaged over the channels of a group: predictions depend on no other example. The moments are stored as mean and
    population variance, so that a large mean costs no accuracy, under the names that batch normalization uses.
    ``normkit.surgery.weigh_examples`` replaces a trained model's batch normalizations by this layer, ``choose_alpha`` tunes
    alpha.

    ``eps``, ``affine``, ``bias`` and ``layout`` and the shapes are those of BatchNorm.

    Args:
        num_channels: channels C.
        num_groups: groups of channels; divides C. Default: None, each channel separately.
        examples_per_group: examples per group; the last group may be smaller. Default: None, the whole batch.
        momentum: weight of the new value in the running moments. Default: 0.01.
        alpha: the example's weight in evaluation, 0 to 1. Default: 1 for one example per group, as in group norm, else 0.

    Raises:
        OptionError: the channels do not split into the groups; an argument outside its range.
        ShapeError: a number of channels other than ``num_channels``, or one value per statistic of several examples in training.

    Reference: Summers and Dinneen (2020), https://arxiv.org/abs/1906.03548, sections 3.1 and 3.4.

    >>> norm = BatchGroupNorm(2, num_groups=1, examples_per_group=2)
    >>> norm(torch.tensor([[1.0, 3.0], [1.0, 3.0], [10.0, 30.0], [10.0, 30.0]])).detach()
    tensor([[-1.0000,  1.0000],
            [-1.0000,  1.0000],
            [-1.0000,  1.0000],
            [-1.0000,  1.0000]])
    """

    shown = (
        "{0.num_channels}, num_groups={0.num_groups}, examples_per_group={0.examples_per_group}, eps={0.eps}, "
        "momentum={0.momentum}, affine={0.affine}, alpha={0.alpha}"
    )
    unusual: ClassVar = {"layout": "n c *"}

    def __init__(
        self,
        num_channels: int,
        num_groups: int | None = None,
        examples_per_group: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        alpha: float | None = None,
        *,
        bias: bool = True,
        layout: str = "n c *",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check(num_channels, num_groups, examples_per_group)
        self.num_channels, self.num_groups, self.examples_per_group = num_channels, num_groups, examples_per_group
        self.eps, self.momentum, self.affine, self.layout = eps, momentum, affine, layout
        self.alpha = float(examples_per_group == 1) if alpha is None else alpha
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"BatchGroupNorm: alpha={alpha}; wanted 0, the running moments, to 1, the example alone")
        self.register_affine((num_channels,), affine, affine and bias, device=device, dtype=dtype)
        self.register_running((num_channels,), "running_mean", "running_var", device=device, dtype=dtype)
        self.complete()

    def make_rule(self) -> Rule:
        self._memory = RunningMoments(self.momentum)
        self._rules = _rules(self.num_groups, self.examples_per_group, self.eps, self.layout)
        return self._rules[0]

    def check(self, input: Tensor) -> None:
        check_channels("BatchGroupNorm", input, self.num_channels, "num_channels", self.layout)
        if self.training and self.examples_per_group != 1:
            _ = self.rule  # follows options that were set since
            check_several("BatchGroupNorm", input[: self.examples_per_group], self._rules[1].support)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check(input)
        _, running = self.rule, self.running()
        assert running is not None
        if not self.training:
            how = {"num_groups": self.num_groups, "layout": self.layout, "mask": mask}
            return example_weighing(input, *running[:2], self.weight, self.bias, self.alpha, self.eps, **how)
        y, found = _train(self._rules, self.examples_per_group, input, self.weight, self.bias, mask, self.backend)
        if found is not None and self.num_groups is None:
            means, variances, n = (self._rows(value, found.mean) for value in found)
            share = n / n.sum(0)  # of each row in the moments of all together
            mean = (share * means).sum(0)
            found = Moments(mean, (share * (variances + (means - mean).square())).sum(0), n.sum(0))
        else:
            found = measure(batch_group_norm_rule(layout=self.layout), input, mask=mask, backend=self.backend)
            if isinstance(found.n, Tensor):  # a channel without elements changes nothing
                found = found._replace(mean=torch.where(found.n > 0, found.mean, math.nan))
        self._memory.blend(running, found.mean.reshape(-1), found.var.reshape(-1))
        return y

    def explain(self, input: Tensor) -> Explanation:
        """Say which back end would normalize this input, and why; of a batch that does not divide, for its full sub-batches."""
        self.check(input)
        (rule, whole), size, affine = (self.rule, self._rules[1]), self.examples_per_group, (self.weight, self.bias)
        if not self.training:
            why = "evaluation mixes running moments with the example's own, by plain operators"
            found = explain(batch_group_norm_rule(self.num_groups, 1, self.eps, self.layout), input, *affine)
            return replace(found, backend="reference", why=why, formula=CARD_WEIGHING.formula)
        if size is None or size == 1:
            return explain(rule, input, *affine, measured=size is None, backend=self.backend)
        return explain_in_sub_batches(rule, whole, size, input, *affine, self.backend)

    def _rows(self, value: Tensor | int, like: Tensor) -> Tensor:
        rows = torch.as_tensor(value, dtype=like.dtype, device=like.device).expand(like.shape)
        return rows.reshape(-1, self.num_channels)


def batch_group_norm(
    input: Tensor,
    num_groups: int | None = None,
    examples_per_group: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    layout: str = "n c *",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Batch/group normalization by the input's own statistics as a function; see BatchGroupNorm.

    >>> batch_group_norm(torch.tensor([[1.0, 3.0], [10.0, 30.0]]), num_groups=1, examples_per_group=1)
    tensor([[-1.0000,  1.0000],
            [-1.0000,  1.0000]])
    """
    _check(input.shape[-1 if layout == "n * c" else 1], num_groups, examples_per_group)
    rules = _rules(num_groups, examples_per_group, eps, layout)
    if examples_per_group != 1:
        check_several("batch_group_norm", input[:examples_per_group], rules[1].support)
    return _train(rules, examples_per_group, input, weight, bias, mask, backend)[0]


def example_weighing(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float = 0.0,
    eps: float = 1e-5,
    *,
    num_groups: int | None = None,
    layout: str = "n c *",
    mask: Tensor | None = None,
) -> Tensor:
    """Normalize by running moments mixed with each example's own; see BatchGroupNorm.

    mean = alpha E[x] + (1 - alpha) m1,  var = alpha E[x^2] + (1 - alpha) m2 - mean^2

    ``running_mean`` is m1, and ``running_var`` m2 - m1^2, the population variance; ``alpha``, ``eps``, ``num_groups`` and
    ``layout`` are those of BatchGroupNorm. Elements where ``mask`` is False enter no statistic and become zero.

    Reference: Summers and Dinneen (2020), https://arxiv.org/abs/1906.03548, equation 3.

    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> [example_weighing(x, torch.tensor([0.0]), torch.tensor([4.0]), alpha=a, eps=0.0)[0, 0, 1].item() for a in (0, 1)]
    [1.5, 1.0]
    """
    rule = batch_group_norm_rule(num_groups, 1, eps, layout)
    split = rule.support.split(input.shape)
    positions = tuple(d for d, name in enumerate(split.names) if name == "*")
    channels = tuple(d for d, name in enumerate(split.names) if name == "c" and num_groups is not None)
    wide = input.to(accumulation_dtype(input.dtype)).reshape(split.shape)
    if mask is not None:
        mask = mask.expand(input.shape).reshape(split.shape)
        wide = torch.where(mask, wide, 0.0)
    assert rule.compensation is not None
    mean, var = (place(value, rule.compensation.per, split).to(wide.dtype) for value in (running_mean, running_var))
    if alpha:
        own = moments(wide, positions, mask)
        apart = own.mean - mean
        var = var + alpha * (own.var - var) + alpha * (1 - alpha) * apart.square()
        mean = mean + alpha * apart
    if channels:
        middle = mean.mean(channels, keepdim=True)
        mean, var = middle, (var + (mean - middle).square()).mean(channels, keepdim=True)
    y = rule.compensation.apply((wide - mean) / (var + eps).sqrt(), split, weight, bias)
    return (y if mask is None else torch.where(mask, y, 0.0)).reshape(input.shape).to(input.dtype)


@remembered
def _rules(groups: int | None, examples: int | None, eps: float, layout: str) -> tuple[Rule, Rule]:
    """The rule, and the same rule with all examples in one group."""
    rule, whole = (batch_group_norm_rule(groups, count, eps, layout) for count in (examples, None))
    return rule, whole


def _train(
    rules: tuple[Rule, Rule],
    examples: int | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Moments | None]:
    if examples == 1:
        return run(rules[0], x, weight, bias, mask=mask, backend=backend), None
    if examples is None:
        return run_measured(rules[1], x, weight, bias, mask=mask, backend=backend)
    return run_in_sub_batches(*rules, examples, x, weight, bias, mask=mask, backend=backend)


def _check(channels: int, groups: int | None, examples: int | None) -> None:
    if groups is not None:
        check_groups("BatchGroupNorm", channels, groups)
    if examples is not None and examples < 1:
        raise OptionError(f"BatchGroupNorm: examples_per_group={examples}; wanted a whole number from 1, or None")


def _build(at: Place) -> BatchGroupNorm:
    # Both words build this layer: 32x2 means groups of channels and examples per group, a single number means alpha.
    groups, examples, alpha = (at.groups, at.examples, None) if "x" in at.option else (None, None, float(at.option))
    momentum, how = at.momentum_or(0.01), {"bias": at.bias, "layout": at.axes, **at.factory}
    return BatchGroupNorm(at.channels, groups, examples, at.eps, momentum, at.affine, alpha, **how)


CARD = Card(
    title="Batch/group normalization",
    word="bgn",
    normalized_over="each group of examples and group of channels, over both and all positions",
    paper=paper("summers2020four"),
    use_cases="few samples per batch, where group normalization is stable but batch normalization would be better",
    strengths="includes batch, ghost, group, layer and instance normalization as special cases, and all between them",
    weaknesses="two sizes to choose; training and inference compute different functions",
    module=BatchGroupNorm,
    functional=batch_group_norm,
    make=lambda channels: BatchGroupNorm(channels, math.gcd(2, channels), 2),
    build=_build,
    option=groups(
        lambda norm: f"{norm.num_groups or norm.num_channels}x{norm.examples_per_group or 'all'}", examples="2"
    ),
    axes=("n c *", "n * c"),
    rule=batch_group_norm_rule(2, 2),
    order_dependent=True,
    running_state=True,
    invariances=frozenset({"weight scale", "data scale"}),
)

CARD_WEIGHING = Card(
    title="Inference example weighing",
    word="weigh",
    normalized_over="each channel: in training over the batch, at inference by running moments mixed with the example's own",
    formula="mean = alpha * E[x] + (1 - alpha) * m1, var = alpha * E[x^2] + (1 - alpha) * m2 - mean^2",
    paper=paper("summers2020four"),
    use_cases="trained networks with batch normalization whose inference differs too much from training",
    strengths="needs no training: one number, tuned on validation data; predictions depend on no other example",
    weaknesses="can't be folded; where there are no positions, the example's own variance is zero",
    module=BatchGroupNorm,
    functional=example_weighing,
    fits=lambda module: module.num_groups is None and module.examples_per_group is None,
    make=lambda channels: BatchGroupNorm(channels, alpha=0.1),
    build=_build,
    option=positive_number("ALPHA", 0.1, of=lambda norm: norm.alpha, most=1.0),
    axes=("n c *", "n * c"),
    over="*",  # at inference, of the example itself
    rule=batch_group_norm_rule(),
    running_state=True,
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift"}),
)
