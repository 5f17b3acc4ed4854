"""A rule: support x statistic x compensation x memory. Most normalizations are one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from normkit.core.compensation import Affine
from normkit.core.errors import NotationError
from normkit.core.memory import Running
from normkit.core.statistic import Statistic
from normkit.core.support import Support, parse_axes


@dataclass(frozen=True)
class Rule:
    """One normalization as data; the module, formula, picture and the kernel's loop nest are derived from it.

    Args:
        support: which elements share a statistic.
        statistic: the centre and the scale.
        compensation: the weight and bias applied afterwards, or None.
        memory: running averages for use at inference, or None.

    Raises:
        NotationError: the compensation or the memory names an axis that the support lacks, or has its axes in another order.

    >>> rule = Rule(Support("n c *", over="n *"), Statistic("mean", "std", 1e-5), Affine("c"), Running(0.1))
    >>> print(rule.formula())
    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias
    >>> rule.batch_dependent
    True
    """

    support: Support
    statistic: Statistic = field(default_factory=Statistic)
    compensation: Affine | None = None
    memory: Running | None = None
    # What back ends prepared for the shapes they have seen; not part of the rule's value.
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for part in (self.compensation, self.memory):
            if part is None:
                continue
            names = [name for group in parse_axes(part.per) for name in group]
            for name in names:
                if name not in self.support.names:
                    raise NotationError(
                        f"{part}: axis {name!r} is not in {self.support}, which has {', '.join(self.support.names)}"
                    )
            if names != [name for name in self.support.names if name in names]:
                raise NotationError(f"{part}: its axes are in another order than in {self.support}; write them so")
            if isinstance(part, Running) and self.support.reduced & set(names):
                raise NotationError(
                    f"{part}: it keeps what {self.support} reduces; keep only {', '.join(self.support.kept)}"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Rule:
        return self  # a rule does not change, and copies share what was prepared for it

    def __reduce__(self) -> tuple[Any, ...]:
        return Rule, (self.support, self.statistic, self.compensation, self.memory)

    def keep(self, key: Any, prepare: Callable[[], Any]) -> Any:
        """Return what was prepared under a key, and prepare it first where it is missing."""
        # Without a lock: two threads may both prepare, and either result serves.
        found = self.prepared.get(key)
        if found is None:
            found = prepare()
            if len(self.prepared) >= 256:  # many shapes, as from ragged batches, must not fill memory
                self.prepared.clear()
            self.prepared[key] = found
        return found  # never read back: another thread may have cleared it

    @property
    def batch_dependent(self) -> bool:
        """Whether a sample's output depends on the other samples, in training."""
        return "n" in self.support.reduced

    def formula(self) -> str:
        """The rule as the literature writes it."""
        normalized = self.statistic.formula()
        return f"y = {self.compensation.formula(normalized) if self.compensation else normalized}"


P = ParamSpec("P")
R = TypeVar("R")


def remembered(make: Callable[P, R]) -> Callable[P, R]:
    """Cache a function that makes a rule from a few settings: equal settings share it, and all that was prepared for it."""
    kept: Callable[..., Any] = lru_cache(256)(make)

    @wraps(make)
    def known(*args: P.args, **kwargs: P.kwargs) -> R:
        # A compiler can trace the function that makes the rule, but not a cache.
        return make(*args, **kwargs) if torch.compiler.is_compiling() else kept(*args, **kwargs)

    return known
