"""Local response normalization: divide each element by the energy of neighbouring channels at the same position."""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.errors import OptionError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.place import whole_number
from normkit.engine import native_window
from normkit.engine.layer import check_channels_first
from normkit.engine.native_window import Window
from normkit.engine.window import sliding_sum


class LocalResponseNorm(Module, nn.LocalResponseNorm):
    """Divide each element by the energy of the channels around it, at the same position.

    By default it computes what ``torch.nn.LocalResponseNorm`` does, whose name and arguments it has:
    y_i = x_i / (k + alpha / size * sum_j x_j^2)^beta, j from max(0, i - size // 2) to min(C - 1, i + (size - 1) // 2), k = 1.

    This is not the published formula, which ``torch_compat=False`` computes: the paper does not divide alpha by size, its window
    ends at i + size // 2, which for an even size is one channel more, and its k is 2. For an odd size, torch's alpha is size
    times the paper's. No parameters; training and evaluation compute the same.

    Args:
        size: size of the channel window. Default: 5.
        alpha: factor of the energy. Default: 1e-4.
        beta: exponent. Default: 0.75.
        k: added to the energy, from 0; None for 1, or 2 without ``torch_compat``. Default: None.
        torch_compat: True computes what torch does, False what the paper prints. Default: True.

    Shape:
        (N, C, *); the output has the same shape.

    Raises:
        OptionError: a size below 1 or a negative k.
        ShapeError: an input without a channel axis.

    Reference:
        Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012),
        https://papers.nips.cc/paper/4824, section 3.3.

    >>> LocalResponseNorm(3, alpha=3.0, beta=1.0)(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[0.1667, 0.1333, 0.2143]])
    """

    unusual: ClassVar = {"torch_compat": True}

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float | None = None,
        *,
        torch_compat: bool = True,
    ) -> None:
        k = _offset(k, torch_compat)
        super().__init__(size, alpha, beta, k)
        self.torch_compat = torch_compat
        _check(size, k)

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k, torch_compat=self.torch_compat)


def local_response_norm(
    input: Tensor,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float | None = None,
    *,
    torch_compat: bool = True,
) -> Tensor:
    """Local response normalization as a function: torch's, or the paper's with ``torch_compat=False``; see LocalResponseNorm.

    >>> local_response_norm(torch.tensor([[1.0, 2.0]]), 2, alpha=2.0, beta=1.0, k=0.0)
    tensor([[1.0000, 0.4000]])
    >>> local_response_norm(torch.tensor([[1.0, 2.0]]), 2, alpha=1.0, beta=1.0, k=0.0, torch_compat=False)
    tensor([[0.2000, 0.4000]])
    """
    k = _offset(k, torch_compat)
    _check(size, k)
    accumulation_dtype(input.dtype)  # refuses integers
    check_channels_first("local_response_norm", input)
    after = (size - 1) // 2 if torch_compat else size // 2
    window = Window(size // 2, after, k, alpha / size if torch_compat else alpha, beta)
    definition = partial(_define, window=window)
    y = native_window.divide(input, window, definition)
    return definition(input) if y is None else y


def _define(x: Tensor, window: Window) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    energy = sliding_sum(wide.square(), 1, window.before, window.after)
    return (wide * (window.offset + window.factor * energy).pow(-window.power)).to(x.dtype)


def _offset(k: float | None, torch_compat: bool) -> float:
    return (1.0 if torch_compat else 2.0) if k is None else k


def _check(size: int, k: float) -> None:
    if size < 1:
        raise OptionError(f"LocalResponseNorm: size={size}; wanted a number of channels from 1")
    if not k >= 0:
        raise OptionError(
            f"LocalResponseNorm: k={k}; wanted a number from 0, as the root of a negative one is not real"
        )


CARD = Card(
    title="Local response normalization",
    word="lrn",
    normalized_over="each position, over a window of neighbouring channels, without centring",
    formula="y = x / (k + alpha * sum over the window of x^2)^beta",
    paper=Paper(
        "Krizhevsky, Alex and Sutskever, Ilya and Hinton, Geoffrey E.",
        "ImageNet Classification with Deep Convolutional Neural Networks",
        2012,
        "https://papers.nips.cc/paper/4824",
    ),
    use_cases="AlexNet, GoogLeNet and other networks of their time; after the nonlinearity",
    strengths="competition between channels at a position; no parameters, independent of the batch",
    weaknesses="the order of channels means nothing to a convolution; does not fix the scale of activations; by default the "
    "class computes torch's form, with alpha / size and k = 1: torch_compat=False gives this formula, as the word does",
    module=LocalResponseNorm,
    functional=local_response_norm,
    make=lambda channels: LocalResponseNorm(min(3, channels), alpha=0.3, torch_compat=False),
    build=lambda at: LocalResponseNorm(int(at.option), torch_compat=False),
    option=whole_number("SIZE", 5, of=lambda norm: norm.size),
    takes=(),
    over="c",
    accompanies=True,
)
