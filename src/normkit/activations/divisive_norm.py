"""Divisive normalization: each response is divided by the pooled activity around it; the published forms."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype, full_precision
from normkit.core.place import whole_number
from normkit.core.support import Support, check_shape
from normkit.engine.layer import check_channels, check_channels_first
from normkit.engine.window import sliding_mean

_SUPPORT = Support("n c *", over="*")


@dataclass(frozen=True)
class Field:
    """The neighbourhood of an element: a window of channels and of positions around it, cut off at the borders.

    Args:
        channels: size of the channel window; None for all.
        positions: size of the window along each spatial axis; None for all.
        samples: whether the field includes the whole batch.
    """

    channels: int | None = None
    positions: int | None = None
    samples: bool = False

    def __post_init__(self) -> None:
        for name, size in (("channels", self.channels), ("positions", self.positions)):
            if size is not None and size < 1:
                raise OptionError(f"Field: {name}={size}; wanted a whole number from 1, or None for all")

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the field of each element of (N, C, *), in a shape that broadcasts over it."""
        windows = [(1, self.channels), *((dim, self.positions) for dim in range(2, x.dim()))]
        return sliding_mean(x, [(0, None), *windows] if self.samples else windows)

    def deviations(self, x: Tensor) -> Tensor:
        """Each element of (N, C, *) minus the mean of its field."""
        # A common mean cancels; without it small deviations keep their digits next to a large mean.
        rest = x - x.mean(tuple(range(0 if self.samples else 1, x.dim())), keepdim=True)
        return rest - self.mean(rest)


class DivisiveNorm(Module):
    """Subtract the mean of one field around each element and divide by the deviation over another.

    v = x - E_A[x], y = weight * v / sqrt(sigma^2 + E_B[v^2]) + bias. One formula with many special cases: if A and B are all
    channels and positions it is layer normalization, with one channel and all positions instance normalization, if they also
    include the batch batch normalization in training, each with sigma^2 for eps; with windows it is the local divisive
    normalization of neuroscience. Training and evaluation compute the same: a field over the batch has no running averages.

    The paper also adds a penalty on |v|, which makes responses sparse: ``centered(x).abs().mean()`` times a small factor.

    Args:
        num_channels: channels C.
        summation: the field A. Default: all channels, 5 positions along each axis.
        suppression: the field B. Default: as A.
        sigma: keeps the divisor above zero, in units of the input. Default: 1.
        affine: whether there are a weight (starts at 1) and a bias (at 0). Default: True.

    Shape: (N, C, *); the output has the same shape.

    Raises:
        ShapeError: a number of channels other than ``num_channels``.
        OptionError: sigma is not above 0.

    Reference: Ren, Liao, Urtasun, Sinz, Zemel, "Normalizing the Normalizers" (2017), https://arxiv.org/abs/1611.04520.

    >>> norm = DivisiveNorm(1, Field(1, 3), Field(1, 3), sigma=0.1)
    >>> norm(torch.tensor([[[1.0, 2.0, 9.0]]])).detach()
    tensor([[[-0.3422, -0.8520,  1.2271]]])
    """

    shown = "{0.num_channels}, summation={0.summation}, suppression={0.suppression}, sigma={0.sigma}"
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        summation: Field | None = None,
        suppression: Field | None = None,
        sigma: float = 1.0,
        affine: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not sigma > 0:
            raise OptionError(f"DivisiveNorm: sigma={sigma}; wanted a number above 0")
        self.num_channels, self.sigma = num_channels, sigma
        self.summation, self.suppression = summation or Field(None, 5), suppression or Field(None, 5)
        self.register_affine((num_channels,), affine, affine, device=device, dtype=dtype)

    def centered(self, input: Tensor) -> Tensor:
        """The input minus the mean of its summation field, on which the paper puts a penalty."""
        return self.summation.deviations(_wide("DivisiveNorm", input)).to(input.dtype)

    def forward(self, input: Tensor) -> Tensor:
        check_channels("DivisiveNorm", input, self.num_channels, "num_channels", "n c *")
        return divisive_norm(input, self.summation, self.suppression, self.sigma, self.weight, self.bias)


def divisive_norm(
    input: Tensor,
    summation: Field | None = None,
    suppression: Field | None = None,
    sigma: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Divisive normalization with a summation and a suppression field as a function; see DivisiveNorm.

    >>> divisive_norm(torch.tensor([[[1.0, 2.0, 9.0]]]), Field(1, 3), Field(1, 3), sigma=0.1)
    tensor([[[-0.3422, -0.8520,  1.2271]]])
    """
    wide = _wide("divisive_norm", input)
    v = (summation or Field(None, 5)).deviations(wide)
    y = v * ((suppression or Field(None, 5)).mean(v.square()) + sigma**2).rsqrt()
    return Affine("c").apply(y, _SUPPORT.split(input.shape), weight, bias).to(input.dtype)


class LyuSimoncelliNorm(Module):
    """Divide each element by the root of the weighted energy of its spatial neighbours, with learned weights.

    y = x / sqrt(b + sum_j w_j x_j^2), j over the positions around it in the same channel. The weights of a channel are the
    product of one profile per spatial axis; b and w are squares of the parameters ``bias`` and ``weight``, so they stay positive.
    It makes the responses of natural images nearly Gaussian. Training and evaluation compute the same.

    Shapes and errors of channels are those of DivisiveNorm.

    Args:
        num_channels: channels C.
        window: positions along each spatial axis; OptionError unless odd. Default: 3.
        eps: added to b. Default: 1e-6.

    Reference: Lyu and Simoncelli (2008), https://doi.org/10.1109/CVPR.2008.4587821.

    >>> LyuSimoncelliNorm(1)(torch.tensor([[[0.0, 3.0, 0.0]]])).detach()
    tensor([[[0.0000, 1.5000, 0.0000]]])
    """

    shown = "{0.num_channels}, window={0.window}, eps={0.eps}"

    def __init__(
        self, num_channels: int, window: int = 3, eps: float = 1e-6, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise OptionError(f"LyuSimoncelliNorm: window={window}; wanted an odd number of positions")
        self.num_channels, self.window, self.eps = num_channels, window, eps
        self.weight = nn.Parameter(torch.empty(num_channels, window, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set b to 1 and the weights along an axis to 1 / window."""
        self.fill(weight=self.window**-0.5, bias=1)

    def forward(self, input: Tensor) -> Tensor:
        check_channels("LyuSimoncelliNorm", input, self.num_channels, "num_channels", "n c *")
        check_shape("LyuSimoncelliNorm", "weight", self.weight, self.num_channels, self.window)
        wide = accumulation_dtype(input.dtype)
        return lyu_simoncelli_norm(input, self.weight.to(wide).square(), self.bias.to(wide).square() + self.eps)


def lyu_simoncelli_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Divide by sqrt(bias + sum_j weight_j x_j^2): a profile of odd length and a bias above 0 per channel.

    >>> lyu_simoncelli_norm(torch.tensor([[[0.0, 3.0, 1.0]]]), torch.full((1, 3), 1.0), torch.ones(1))
    tensor([[[0.0000, 0.9045, 0.3015]]])
    """
    wide = _wide("lyu_simoncelli_norm", input)
    taps = weight.shape[-1] if weight.dim() and weight.shape[-1] % 2 else 3  # an even profile has no centre
    check_shape("lyu_simoncelli_norm", "weight", weight, input.shape[1], taps)
    check_shape("lyu_simoncelli_norm", "bias", bias, input.shape[1])
    energy, window = wide.square(), weight.shape[1]
    for dim in range(2, input.dim()):
        padded = F.pad(energy, [0, 0] * (input.dim() - 1 - dim) + [window // 2] * 2)
        taps = [_per_channel(weight[:, k], input) * padded.narrow(dim, k, input.shape[dim]) for k in range(window)]
        energy = sum(taps[1:], taps[0])
    return (wide * (energy + _per_channel(bias, input)).rsqrt()).to(input.dtype)


class HeegerNorm(Module):
    """Divide each rectified response, raised to a power, by the pooled activity of all channels at its position.

    y_i = gain * d_i^p / (sigma^p + sum_k w_ik d_k^p), d = max(x, 0): the model of neurons in the visual cortex. The weights w are
    squares of the parameter ``weight``, so they stay positive. Training and evaluation compute the same.

    Shapes and errors of channels are those of DivisiveNorm.

    Args:
        num_channels: channels C.
        exponent: the power p; OptionError unless from 1. Default: 2.
        sigma: the activity at which the response is half its maximum; OptionError unless above 0. Default: 1.
        gain: the largest response. Default: 1.

    Reference: Heeger (1992), https://doi.org/10.1017/S0952523800009640.

    >>> HeegerNorm(2)(torch.tensor([[2.0, -3.0]])).detach()
    tensor([[1.3333, 0.0000]])
    """

    shown = "{0.num_channels}, exponent={0.exponent}, sigma={0.sigma}, gain={0.gain}"

    def __init__(
        self,
        num_channels: int,
        exponent: float = 2.0,
        sigma: float = 1.0,
        gain: float = 1.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not (exponent >= 1 and sigma > 0):
            raise OptionError(f"HeegerNorm: exponent={exponent}, sigma={sigma}; wanted from 1, and above 0")
        self.num_channels, self.exponent, self.sigma, self.gain = num_channels, exponent, sigma, gain
        self.weight = nn.Parameter(torch.empty(num_channels, num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every weight to 1 / C: the mean activity."""
        nn.init.constant_(self.weight, self.num_channels**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        check_channels("HeegerNorm", input, self.num_channels, "num_channels", "n c *")
        weight = self.weight.to(accumulation_dtype(input.dtype)).square()
        return heeger_norm(input, weight, self.exponent, self.sigma, self.gain)


def heeger_norm(input: Tensor, weight: Tensor, exponent: float = 2.0, sigma: float = 1.0, gain: float = 1.0) -> Tensor:
    """Heeger's normalization with weights of shape (C, C), where row i is the pool of channel i; see HeegerNorm.

    >>> heeger_norm(torch.tensor([[2.0, -3.0]]), torch.full((2, 2), 0.5))
    tensor([[1.3333, 0.0000]])
    """
    wide = _wide("heeger_norm", input)
    check_shape("heeger_norm", "weight", weight, input.shape[1], input.shape[1])
    active = wide > 0
    # The inner where keeps the derivatives of the power finite where nothing is active.
    drive = torch.where(active, torch.where(active, wide, 1.0).pow(exponent), 0.0)
    with full_precision(input):
        pool = F.linear(drive.movedim(1, -1), weight.to(wide.dtype)).movedim(-1, 1)
    return (gain * drive / (pool + sigma**exponent)).to(input.dtype)


def _wide(who: str, x: Tensor) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    check_channels_first(who, x)
    return wide


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """A view that broadcasts over (N, C, *), in its accumulation dtype."""
    return parameter.to(accumulation_dtype(x.dtype)).view([-1] + [1] * (x.dim() - 2))


CARD = Card(
    title="Divisive normalization",
    word="dn",
    normalized_over="each element, over a field of channels and positions around it",
    formula="y = weight * v / sqrt(sigma^2 + E_B[v^2]) + bias,  v = x - E_A[x]",
    paper=paper("ren2017normalizing"),
    use_cases="image restoration, recurrent networks; models of the visual system",
    strengths="includes batch, layer, instance and local normalization; sigma is a threshold that can be chosen",
    weaknesses="windows cost several passes; sigma breaks the invariance to scale",
    module=DivisiveNorm,
    functional=divisive_norm,
    make=lambda channels: DivisiveNorm(channels, Field(1, 3), Field(None, 3)),
    build=lambda at: DivisiveNorm(
        at.channels, Field(None, int(at.option)), Field(None, int(at.option)), affine=at.affine, **at.factory
    ),
    option=whole_number("WINDOW", 5, of=lambda norm: norm.suppression.positions),
    over="c *",
    invariances=frozenset({"data shift"}),
)

CARD_LYU_SIMONCELLI = Card(
    title="Divisive normalization of Lyu and Simoncelli",
    word="lyu",
    normalized_over="each element, over a weighted window of positions in its channel, without centring",
    formula="y = x / sqrt(b + sum_j w_j x_j^2)",
    paper=paper("lyu2008nonlinear"),
    use_cases="representations of natural images; restoration and quality measures",
    strengths="removes the dependence between neighbouring responses; can be inverted",
    weaknesses="bounds responses without fixing their scale",
    module=LyuSimoncelliNorm,
    functional=lyu_simoncelli_norm,
    build=lambda at: LyuSimoncelliNorm(at.channels, int(at.option), **at.factory),
    option=whole_number("WINDOW", 3, of=lambda norm: norm.window),
    takes=(),
    over="*",
    accompanies=True,
)

CARD_HEEGER = Card(
    title="Divisive normalization of Heeger",
    word="heeger",
    normalized_over="each position, over a weighted pool of its channels, without centring",
    formula="y_i = gain * d_i^p / (sigma^p + sum_k w_ik d_k^p),  d = max(x, 0)",
    paper=paper("heeger1992normalization"),
    use_cases="models of the visual system",
    strengths="responses saturate at the gain whatever the contrast; explains masking between neurons",
    weaknesses="rectifies; later layers see only ratios of activities",
    module=HeegerNorm,
    functional=heeger_norm,
    build=lambda at: HeegerNorm(at.channels, **at.factory),
    takes=(),
    over="c",
    accompanies=True,
)
