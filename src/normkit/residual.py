"""The placement of the norms around the branches of a transformer, for one branch and for a whole stack of layers."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from normkit.core.errors import OptionError, check_options

Placement = Literal["pre", "post", "sandwich", "branch", "none", "deep", "mix", "scaled"]
Scheme = Literal["pre", "post", "sandwich", "branch", "deep", "mix", "scaled", "hybrid"]

_FORMULAS = {
    "pre": "x + f(norm(x))",
    "post": "norm(x + f(x))",
    "sandwich": "x + norm_after(f(norm(x)))",
    "branch": "x + norm(f(x))",
    "none": "x + f(x)",
}
_POST_SHARE = 0.25  # of the layers, in Mix-LN


class Place(NamedTuple):
    """Where one branch has its norm: a formula of the table in ``Residual``, and its constants."""

    formula: str  # a key of _FORMULAS
    skip: float = 1.0  # factor of x in the sum
    gain: float = 1.0  # factor of the norm's output before f
    start: float = 1.0  # factor of the branch's initial weights: the values', the output's and both of the feed-forward

    def join(
        self,
        input: Tensor,
        branch: Callable[[Tensor], Tensor],
        norm: Callable[[Tensor], Tensor] | None,
        after: Callable[[Tensor], Tensor] | None = None,
        dropout: Callable[[Tensor], Tensor] = lambda y: y,
    ) -> Tensor:
        """Compute the branch with its norm (and ``after``, the second of a sandwich) and add its dropout to the input."""
        x = input
        if self.formula in ("pre", "sandwich"):
            assert norm is not None
            x = norm(x) if self.gain == 1.0 else norm(x) * self.gain
        y = branch(x)
        if self.formula == "branch":
            assert norm is not None
            y = norm(y)
        if after is not None:
            y = after(y)
        y = (input if self.skip == 1.0 else input * self.skip) + dropout(y)
        if self.formula == "post":
            assert norm is not None
            y = norm(y)
        return y

    def __str__(self) -> str:
        formula = _FORMULAS[self.formula]
        if self.skip != 1.0:
            formula = formula.replace("x +", f"{self.skip:.3g} x +")
        return formula if self.gain == 1.0 else formula.replace("norm(x)", f"{self.gain:.3g} norm(x)")


def place(placement: Placement, layer: int | None = None, depth: int | None = None) -> Place:
    """Find the place of the norm of one branch, in layer number ``layer`` (from 1) of ``depth``.

    >>> str(place("scaled", layer=4)), str(place("deep", depth=8))
    ('x + f(0.5 norm(x))', 'norm(2 x + f(x))')
    """
    check_options("Residual", placement=(placement, Placement))
    needed = {"deep": {"depth": depth}, "mix": {"layer": layer, "depth": depth}, "scaled": {"layer": layer}}
    for name, number in needed.get(placement, {}).items():
        if number is None or number < 1:
            raise OptionError(f"placement={placement!r} with {name}={number}; wanted {name}= a whole number from 1")
    if placement == "deep":
        assert depth is not None
        return Place("post", skip=(2 * depth) ** 0.25, start=(8 * depth) ** -0.25)
    if placement == "mix":
        assert layer is not None
        assert depth is not None
        return Place("post" if layer <= math.floor(_POST_SHARE * depth) else "pre")
    if placement == "scaled":
        assert layer is not None
        return Place("pre", gain=layer**-0.5)
    return Place(placement)


def places(scheme: Scheme, layer: int, depth: int) -> tuple[Place, Place]:
    """Find the places of the norms in one layer of a transformer: of its attention and of its feed-forward.

    Every placement but ``"none"`` is the scheme that has it in both branches. In ``"hybrid"`` the attention also normalizes its
    queries, keys and values over the features of each head; Post-LN goes around it and no norm around the feed-forward. The
    paper draws that norm as the feed-forward's, whose input and skip connection both start behind it: the same network (Zhuo et
    al., "HybridNorm" (2025), https://arxiv.org/abs/2503.04598).
    """
    check_options("places", scheme=(scheme, Scheme))
    if scheme == "hybrid":
        return Place("post"), Place("none")
    found = place(scheme, layer, depth)
    return found, found


class Residual(nn.Module):
    """A residual branch around any sublayer, with the norm in one of the published places.

    ============  ======================================  =======================================================
    placement     computes                                known as
    ============  ======================================  =======================================================
    ``post``      norm(x + f(x))                          Post-LN, original transformer
    ``pre``       x + f(norm(x))                          Pre-LN; needs one more norm at the end
    ``sandwich``  x + norm_after(f(norm(x)))              sandwich norm, Peri-LN; one more norm at the end
    ``branch``    x + norm(f(x))                          residual post-norm
    ``deep``      norm((2 depth)^(1/4) x + f(x))          DeepNorm of an encoder or decoder alone
    ``mix``       post if layer <= depth / 4, else pre    Mix-LN; one more norm at the end
    ``scaled``    x + f(norm(x) / sqrt(layer))            LayerNorm scaling; one more norm at the end
    ``none``      x + f(x)                                no norm; feed-forward of HybridNorm, see ``places``
    ============  ======================================  =======================================================

    With ``post``, gradients of the last layers stay large at any depth, and the learning rate needs a warm-up; with ``pre`` they
    shrink with the root of the depth, and it needs none (see ``normkit.schedules``). DeepNorm also divides the initial weights of
    the branch (of attention: values and output) by (8 depth)^(1/4): ``place.start`` is that factor, and
    ``normkit.surgery.place_norms`` applies it.

    Args:
        sublayer: f, which keeps the shape of x.
        norm: makes a norm, e.g. ``functools.partial(normkit.LayerNorm, 512)``; called once, or twice for a sandwich.
        placement: one of those in the table. Default: "pre".
        layer: number of the branch's layer, from 1; for ``mix`` and ``scaled``. Default: None.
        depth: number of layers; for ``deep`` and ``mix``. Default: None.
        dropout: dropout probability of the branch's output, in training. Default: 0.

    Shape:
        That of the sublayer.

    Raises:
        OptionError: an unknown placement, or one without the number that it needs.

    Reference:
        Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020), https://arxiv.org/abs/2002.04745;
        sandwich, Ding et al., "CogView" (2021), https://arxiv.org/abs/2105.13290, and Kim et al., "Peri-LN" (2025),
        https://arxiv.org/abs/2502.02732;
        branch, Liu et al., "Swin Transformer V2" (2022), https://arxiv.org/abs/2111.09883;
        deep, Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers" (2022), https://arxiv.org/abs/2203.00555;
        mix, Li, Yin, Liu, "Mix-LN" (2024), https://arxiv.org/abs/2412.13795;
        scaled, Sun et al., "The Curse of Depth in Large Language Models" (2025), https://arxiv.org/abs/2502.05795.

    >>> block = Residual(nn.Identity(), lambda: nn.LayerNorm(2, eps=0.0), placement="pre")
    >>> block(torch.tensor([[1.0, 3.0]])).detach()
    tensor([[0., 4.]])
    """

    def __init__(
        self,
        sublayer: nn.Module,
        norm: Callable[[], nn.Module],
        placement: Placement | Place = "pre",
        *,
        layer: int | None = None,
        depth: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.place = placement if isinstance(placement, Place) else place(placement, layer, depth)
        self.sublayer = sublayer
        self.norm = norm() if self.place.formula != "none" else None
        self.norm_after = norm() if self.place.formula == "sandwich" else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add the branch.

        Args:
            input: input of the sublayer.
            *args: passed to the sublayer.
            **kwargs: likewise, e.g. a mask.

        Returns:
            A tensor of the input's shape.
        """
        return self.place.join(
            input, lambda x: self.sublayer(x, *args, **kwargs), self.norm, self.norm_after, self.dropout
        )

    def extra_repr(self) -> str:
        return f"{self.place.formula!r}: {self.place}"
