"""Learning-rate warm-up, inverse square root and linear, which networks with a norm after each branch need."""

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from normkit.core.errors import OptionError

__all__ = ["inverse_sqrt_rate", "inverse_sqrt_warmup", "linear_rate", "linear_warmup"]


def inverse_sqrt_rate(step: int, features: int, warmup: int = 4000) -> float:
    """Compute the learning rate of the original transformer, with factor 1.

    rate(t) = features^-1/2 * min(t^-1/2, t * warmup^-3/2): linear up to t = warmup, where it is (features * warmup)^-1/2,
    then falling with the root of t.

    Args:
        step: t, from 1.
        features: width of the model.
        warmup: steps of warm-up. Default: 4000.

    Raises:
        OptionError: a step, width or warm-up below 1.

    Reference:
        Vaswani et al., "Attention Is All You Need" (2017), https://arxiv.org/abs/1706.03762, section 5.3.

    >>> [round(inverse_sqrt_rate(t, features=100, warmup=100), 6) for t in (50, 100, 400)]
    [0.005, 0.01, 0.005]
    """
    _check(step=step, features=features, warmup=warmup)
    return features**-0.5 * min(step**-0.5, step * warmup**-1.5)


def linear_rate(step: int, warmup: int, after: Callable[[int], float] | None = None) -> float:
    """Compute a factor that rises from 1 / warmup to 1 in equal steps and then follows another schedule.

    factor(t) = t / warmup for t <= warmup, then after(t - warmup).

    Args:
        step: t, from 1.
        warmup: steps of warm-up; 0 for none.
        after: the factor as a function of the steps since then; None for 1. Default: None.

    Raises:
        OptionError: a step below 1, or a negative warm-up.

    Reference:
        Goyal et al., "Accurate, Large Minibatch SGD" (2017), https://arxiv.org/abs/1706.02677, section 2.2.

    >>> [linear_rate(t, warmup=4) for t in (1, 2, 4, 9)]
    [0.25, 0.5, 1.0, 1.0]
    """
    _check(step=step)
    _check_warmup(warmup)
    if step <= warmup:
        return step / warmup
    return 1.0 if after is None else after(step - warmup)


def inverse_sqrt_warmup(optimizer: Optimizer, features: int, warmup: int = 4000) -> LambdaLR:
    """Make the schedule of the original transformer for an optimizer whose ``lr`` is the factor; see inverse_sqrt_rate.

    Args:
        optimizer: an optimizer whose ``lr`` is the factor, 1 as published.
        features: width of the model.
        warmup: steps of warm-up. Default: 4000.

    Returns:
        A scheduler: call its ``step()`` after each step of the optimizer.

    Raises:
        OptionError: a width or warm-up below 1.

    Reference:
        Vaswani et al., "Attention Is All You Need" (2017), https://arxiv.org/abs/1706.03762, section 5.3.

    >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> inverse_sqrt_warmup(optimizer, features=100, warmup=100).get_last_lr()  # step 1 of 100 up to 0.01
    [0.0001]
    """
    _check(features=features, warmup=warmup)
    return LambdaLR(optimizer, lambda done: inverse_sqrt_rate(done + 1, features, warmup))


def linear_warmup(optimizer: Optimizer, warmup: int, after: Callable[[int], float] | None = None) -> LambdaLR:
    """Make a linear warm-up to the optimizer's ``lr``, followed by another schedule; see linear_rate.

    Args:
        optimizer: an optimizer whose ``lr`` is the highest rate.
        warmup: steps of warm-up; 0 for none.
        after: the factor on ``lr`` as a function of the steps since then; None for 1. Default: None.

    Returns:
        A scheduler: call its ``step()`` after each step of the optimizer.

    Raises:
        OptionError: a negative warm-up.

    Reference:
        Goyal et al., "Accurate, Large Minibatch SGD" (2017), https://arxiv.org/abs/1706.02677, section 2.2.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    >>> linear_warmup(optimizer, warmup=4).get_last_lr()
    [0.1]
    """
    _check_warmup(warmup)
    return LambdaLR(optimizer, lambda done: linear_rate(done + 1, warmup, after))


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise OptionError(f"warm-up: {name}={number}; wanted at least 1")


def _check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise OptionError(f"warm-up: warmup={warmup}; wanted a number of steps, or 0 for none")
