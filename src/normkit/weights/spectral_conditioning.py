"""Spectral conditioning of attention: a fixed multiple of the identity is added to the query's, key's and value's weights."""

import math

import torch
from torch import Tensor

from normkit.core.card import Card, Paper
from normkit.core.errors import OptionError
from normkit.core.support import show
from normkit.weights import kernels
from normkit.weights.attachment import ModuleT, attach
from normkit.weights.layout import WeightLayout, weight_layout, weight_of
from normkit.weights.parametrization import Parametrization


class SpectralConditioning(Parametrization):
    """The parametrization w = v + shift * I, where the shift is a constant and I has ones on its main diagonal.

    The weight is taken as its matrix, one row per output unit, and I has its shape, square or not. Where a weight stacks several
    matrices, as the query's, the key's and the value's in attention, each gets an I of its own. Trained is v, from its own
    initial values: the function at the start is another one than without the shift, as the paper means it, so put this on before
    training. Folding adds the shift to the weight.

    The identity of the matrix is added as a whole, not one for each head; so we read the paper, whose formulas have one head.

    Args:
        shift: the factor of I, called lambda. Default: 10.
        layout: layout of the weight. Default: axis 0 indexes output units.
        blocks: number of matrices stacked along output units. Default: 1.

    Shape:
        Any of two axes or more; the output has the same shape.

    Raises:
        OptionError: a shift that is not finite, or less than one block.

    Reference:
        Saratchandran, Lucey, "Spectral Conditioning of Attention Improves Transformer Performance" (2025),
        https://arxiv.org/abs/2603.07162.

    >>> SpectralConditioning(2.0)(torch.ones(2, 3))
    tensor([[3., 1., 1.],
            [1., 3., 1.]])
    """

    def __init__(self, shift: float = 10.0, layout: WeightLayout | None = None, blocks: int = 1) -> None:
        super().__init__()
        if not math.isfinite(shift):
            raise OptionError(
                f"SpectralConditioning: shift={shift}; wanted a finite number, the factor of the identity"
            )
        if blocks < 1:
            raise OptionError(f"SpectralConditioning: blocks={blocks}; wanted a whole number from 1")
        self.shift, self.layout, self.blocks = shift, layout or WeightLayout(), blocks

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        rows, columns = self.layout.matrix(weight).shape
        eye = torch.eye(rows // self.blocks, columns, device=weight.device, dtype=weight.dtype) * self.shift
        return weight + self.layout.weight(eye.repeat(self.blocks, 1), weight.shape)

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        """No kernel: one addition is as fast."""
        return None

    def extra_repr(self) -> str:
        return f"shift={self.shift:g}" + (f", blocks={self.blocks}" if self.blocks > 1 else "")


def spectral_conditioning(
    layer: ModuleT, name: str = "weight", shift: float = 10.0, *, blocks: int | None = None
) -> ModuleT:
    """Add a fixed multiple of the identity to a layer's weight, in place; the raw weight stays the trained parameter.

    For the query, key and value layers of attention: ``in_proj_weight`` (or the separate ones) of
    ``torch.nn.MultiheadAttention``, and linear layers of other attention, apart or packed into one.

    Args:
        layer: the layer that holds the weight.
        name: name of the weight. Default: "weight".
        shift: factor of the identity. Default: 10, the paper's.
        blocks: number of matrices stacked along output units. Default: None: the groups of the layout, which are 3 for an
            ``in_proj_weight``; 3 for a Linear (or GPT-2's Conv1D) with three times as many outputs as inputs, which packs
            queries, keys and values; else 1.

    Returns:
        The layer.

    Raises:
        OptionError: no such weight, one with fewer than two axes, a shift that is not finite, or rows that do not split into the
            blocks.

    Reference:
        Saratchandran, Lucey (2025), https://arxiv.org/abs/2603.07162.

    >>> layer = spectral_conditioning(nn.Linear(2, 2), shift=3.0)
    >>> layer.weight = torch.zeros(2, 2)
    >>> layer.weight.detach()
    tensor([[3., 0.],
            [0., 3.]])
    """
    weight = weight_of(layer, name, "spectral_conditioning")
    layout = weight_layout(layer, name)
    if weight.dim() < 2:
        raise OptionError(
            f"spectral_conditioning: the {name} of {type(layer).__name__} ({show(weight.shape)}) is no matrix; wanted two axes "
            "or more"
        )
    rows, columns = layout.matrix(weight).shape
    if blocks is None:
        packed = weight.dim() == 2 and rows == 3 * columns and layout.groups == 1
        blocks = 3 if packed else layout.groups
    if blocks < 1 or rows % blocks:
        raise OptionError(
            f"spectral_conditioning: the {rows} output units of the {name} of {type(layer).__name__} do not split into "
            f"blocks={blocks}; wanted a number that divides them"
        )
    return attach(layer, name, SpectralConditioning(shift, layout, blocks))


def add_identity(weight: Tensor, shift: float = 10.0, *, layout: WeightLayout | None = None, blocks: int = 1) -> Tensor:
    """Spectral conditioning as a function; see SpectralConditioning.

    >>> add_identity(torch.zeros(4, 2), 1.0, blocks=2)
    tensor([[1., 0.],
            [0., 1.],
            [1., 0.],
            [0., 1.]])
    """
    return SpectralConditioning(shift, layout, blocks)(weight)


CARD = Card(
    name="spectral_conditioning",
    title="Spectral conditioning of attention",
    kind="weight",
    word="sc",
    normalized_over="nothing: no statistic, a constant is added to the diagonal",
    formula="w = v + shift * I, shift = 10",
    paper=Paper(
        "Saratchandran, Hemanth and Lucey, Simon",
        "Spectral Conditioning of Attention Improves Transformer Performance",
        2025,
        "https://arxiv.org/abs/2603.07162",
    ),
    use_cases="query, key and value layers of transformers, from the start of training",
    strengths="no parameters and no statistic; a large shift lowers the weights' condition number; free once folded",
    weaknesses="as we read it from summaries, without the authors' code; starts at another function; for attention alone",
    module=SpectralConditioning,
    functional=add_identity,
    make=spectral_conditioning,
)
