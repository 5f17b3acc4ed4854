"""Local response and local contrast normalization: divide each element by the energy of its neighbourhood."""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype, full_precision
from normkit.core.place import whole_number
from normkit.engine import native_window
from normkit.engine.layer import check_channels_first
from normkit.engine.native_window import Window
from normkit.engine.window import sliding_mean, sliding_sum


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

    Shape: (N, C, *); the output has the same shape.

    Raises:
        OptionError: a size below 1 or a negative k.
        ShapeError: an input without a channel axis.

    Reference: Krizhevsky, Sutskever, Hinton (2012), https://papers.nips.cc/paper/4824, section 3.3.

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
        raise OptionError(f"LocalResponseNorm: k={k}; wanted a number from 0: a negative one has no real root")


CARD = Card(
    title="Local response normalization",
    word="lrn",
    normalized_over="each position, over a window of neighbouring channels, without centring",
    formula="y = x / (k + alpha * sum over the window of x^2)^beta",
    paper=paper("krizhevsky2012imagenet"),
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


class LocalContrastNorm(Module):
    """Divide by the contrast of the neighbourhood.

    ``form="response"`` is local response normalization with the energy of the deviations from a local mean; the numerator is
    not centred: y_i = x_i / (k + alpha * sum_j (x_j - E[x_j])^2)^beta, j over the channels from i - size // 2 to
    i + size // 2, E over the window of positions.

    ``form="jarrett"`` subtracts and divides: v = x - sum_w x, y = v / max(c, s) with s = sqrt(sum_w v^2), where sum_w weights all
    channels equally and positions by a Gaussian, with weights that sum to 1, and c is the mean of s over its positions. This
    form is invariant to the brightness and contrast of the sample. eps is a floor of the divisor, for a sample without contrast.

    At the borders both means are over the part inside the image. No parameters; training and evaluation compute the same.

    Args:
        size: size of the channel window, in the response form. Default: 5.
        window: positions along each spatial axis; None for 5 in the response form and 9 in Jarrett's. Default: None.
        alpha: factor of the energy, in the response form. Default: 1e-4.
        beta: exponent, in the response form. Default: 0.75.
        k: added to the energy, in the response form. Default: 2.
        form: ``"response"`` or ``"jarrett"``. Default: ``"response"``.
        sigma: deviation of the Gaussian, in positions, in Jarrett's form; None for window / 6. Default: None.
        eps: floor of the divisor, in Jarrett's form. Default: 1e-5.

    Shape: (N, C, *); the output has the same shape.

    Raises:
        OptionError: an unknown form, a size or window below 1, an even window in Jarrett's form, a negative k.
        ShapeError: an input without a channel axis.

    Reference: Jarrett, Kavukcuoglu, Ranzato, LeCun (2009), https://doi.org/10.1109/ICCV.2009.5459469.

    >>> LocalContrastNorm(1, 3, alpha=1.0, beta=1.0)(torch.tensor([[[4.0, 4.0, 4.0, 10.0]]]))
    tensor([[[2.0000, 2.0000, 0.6667, 0.9091]]])
    """

    def __init__(
        self,
        size: int = 5,
        window: int | None = None,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        *,
        form: str = "response",
        sigma: float | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.window = _contrast_window(size, window, k, form, sigma)
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.form, self.sigma, self.eps = form, sigma, eps

    def forward(self, input: Tensor) -> Tensor:
        how = {"form": self.form, "sigma": self.sigma, "eps": self.eps}
        return local_contrast_norm(input, self.size, self.window, self.alpha, self.beta, self.k, **how)

    def extra_repr(self) -> str:
        if self.form == "jarrett":
            return f"window={self.window}, form='jarrett', sigma={self.sigma}, eps={self.eps}"
        return f"{self.size}, window={self.window}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


def local_contrast_norm(
    input: Tensor,
    size: int = 5,
    window: int | None = None,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    *,
    form: str = "response",
    sigma: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Local contrast normalization as a function; see LocalContrastNorm.

    >>> local_contrast_norm(torch.tensor([[[1.0, 2.0, 3.0]]]), window=3, form="jarrett", sigma=1e6)
    tensor([[[-1.3449,  0.0000,  1.3449]]])
    """
    window = _contrast_window(size, window, k, form, sigma)
    wide = input.to(accumulation_dtype(input.dtype))
    check_channels_first("local_contrast_norm", input)
    space = tuple(range(2, input.dim()))
    if form == "jarrett":
        with full_precision(input):
            return _jarrett(wide, window, window / 6 if sigma is None else sigma, eps).to(input.dtype)
    # A common mean cancels in the deviations; subtracted first, it costs small deviations no digits.
    rest = wide - wide.mean(space, keepdim=True) if space else wide
    deviation = rest - sliding_mean(rest, [(dim, window) for dim in space])
    energy = sliding_sum(deviation.square(), 1, size // 2, size // 2)
    return (wide * (k + alpha * energy).pow(-beta)).to(input.dtype)


def _jarrett(x: Tensor, window: int, sigma: float, eps: float) -> Tensor:
    """The subtractive and divisive form, on a tensor of the accumulation dtype."""
    axes = tuple(range(1, x.dim()))
    x = x - x.mean(axes, keepdim=True)  # cancels here too
    # All channels have the same weight: averaged first, they leave one channel to blur.
    v = x - _blur(x.mean(1, keepdim=True), window, sigma)
    energy = _blur(v.square().mean(1, keepdim=True), window, sigma)
    tiny = torch.finfo(x.dtype).tiny  # the root of 0 has no derivative
    contrast = energy.clamp_min(tiny).sqrt()
    return v / torch.maximum(contrast, contrast.mean(axes, keepdim=True)).clamp_min(eps)


def _blur(x: Tensor, window: int, sigma: float) -> Tensor:
    """Gaussian mean over all axes but the first two, of the part inside the image."""
    at = torch.arange(window, device=x.device, dtype=x.dtype) - window // 2
    kernel = torch.exp(-0.5 * (at / sigma).square()).view(1, 1, window)
    for dim in range(2, x.dim() if x.numel() else 0):
        moved = x.movedim(dim, -1)
        lines = moved.reshape(moved[..., 0].numel(), 1, x.shape[dim])
        inside = F.conv1d(torch.ones_like(lines[:1]), kernel, padding=window // 2) if len(lines) else 1.0
        x = (F.conv1d(lines, kernel, padding=window // 2) / inside).view(moved.shape).movedim(-1, dim)
    return x


def _contrast_window(size: int, window: int | None, k: float, form: str, sigma: float | None) -> int:
    """Refuse options outside their range, and return the window."""
    check_options("LocalContrastNorm", form=(form, ("response", "jarrett")))
    window = (9 if form == "jarrett" else 5) if window is None else window
    if size < 1 or window < 1:
        raise OptionError(f"LocalContrastNorm: size={size}, window={window}; wanted whole numbers from 1")
    if not k >= 0:
        raise OptionError(f"LocalContrastNorm: k={k}; wanted a number from 0")
    if form == "jarrett" and window % 2 == 0:
        raise OptionError(f"LocalContrastNorm: window={window} has no centre; wanted an odd one, e.g. {window + 1}")
    if sigma is not None and not sigma > 0:
        raise OptionError(f"LocalContrastNorm: sigma={sigma}; wanted a number above 0, in positions")
    return window


CARD_LOCAL_CONTRAST = Card(
    title="Local contrast normalization",
    word="lcn",
    normalized_over="each position, over a window of positions and channels around it",
    formula="y = x / (k + alpha * sum over channels of (x - E[x])^2)^beta, or v / max(c, s) with v = x - E[x], s^2 = E[v^2]",
    paper=paper("jarrett2009what"),
    use_cases="the input of vision networks under uneven light; convolutional networks before batch normalization",
    strengths="evens out light and contrast across an image; no parameters, independent of the batch",
    weaknesses="costs several passes; does not fix the scale of activations in the response form",
    module=LocalContrastNorm,
    functional=local_contrast_norm,
    make=lambda channels: LocalContrastNorm(3, 3, alpha=0.3),
    build=lambda at: LocalContrastNorm(window=int(at.option)),
    option=whole_number("WINDOW", 5, of=lambda norm: norm.window),
    takes=(),
    over="c *",
    accompanies=True,
)

CARD_JARRETT = Card(
    name="jarrett_contrast_norm",
    title="Local contrast normalization, subtractive and divisive",
    word="jarrett",
    normalized_over="each position, over a Gaussian window of positions and all channels",
    formula="y = v / max(c, s),  v = x - E_w[x],  s^2 = E_w[v^2],  c = mean of s over positions",
    paper=CARD_LOCAL_CONTRAST.paper,
    use_cases="the input of vision networks under uneven light",
    strengths="invariant to the brightness and contrast of each image; no parameters, independent of the batch",
    weaknesses="mixes all channels, which fits feature maps less than images; only c limits noise in flat regions",
    module=LocalContrastNorm,
    functional=local_contrast_norm,
    make=lambda channels: LocalContrastNorm(window=3, form="jarrett", sigma=1.0),
    build=lambda at: LocalContrastNorm(window=int(at.option), form="jarrett"),
    option=whole_number("WINDOW", 9, of=lambda norm: norm.window),
    takes=(),
    over="c *",
    accompanies=True,
    fits=lambda module: module.form == "jarrett",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)
