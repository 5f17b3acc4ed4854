"""The placement of the norm in a residual branch: before, after, on both sides, or on the branch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from normkit.core.errors import OptionError

Placement = Literal["pre", "post", "sandwich", "branch"]

_FORMULAS = {
    "pre": "x + f(norm(x))",
    "post": "norm(x + f(x))",
    "sandwich": "x + norm_after(f(norm(x)))",
    "branch": "x + norm(f(x))",
}


class Residual(nn.Module):
    """A residual branch around any sublayer, with the norm in one of the published places.

    ============  ==============================  ======================================
    placement     computes                        known as
    ============  ==============================  ======================================
    ``post``      norm(x + f(x))                  Post-LN, original transformer
    ``pre``       x + f(norm(x))                  Pre-LN; needs one more norm at the end
    ``sandwich``  x + norm_after(f(norm(x)))      sandwich norm, peri-LN
    ``branch``    x + norm(f(x))                  residual post-norm
    ============  ==============================  ======================================

    With ``post``, gradients of the last layers stay large at any depth, and the learning rate needs a warm-up; with ``pre`` they
    shrink with the root of the depth, and it needs none (see ``normkit.schedules``).

    Args:
        sublayer: f, which keeps the shape of x.
        norm: makes a norm, e.g. ``functools.partial(normkit.LayerNorm, 512)``; called once, or twice for a sandwich.
        placement: one of those in the table. Default: "pre".
        dropout: dropout probability of the branch's output, in training. Default: 0.

    Shape:
        That of the sublayer.

    Raises:
        OptionError: an unknown placement.

    Reference:
        Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020), https://arxiv.org/abs/2002.04745;
        sandwich, Ding et al., "CogView" (2021), https://arxiv.org/abs/2105.13290;
        branch, Liu et al., "Swin Transformer V2" (2022), https://arxiv.org/abs/2111.09883.

    >>> block = Residual(nn.Identity(), lambda: nn.LayerNorm(2, eps=0.0), placement="pre")
    >>> block(torch.tensor([[1.0, 3.0]])).detach()
    tensor([[0., 4.]])
    """

    def __init__(
        self,
        sublayer: nn.Module,
        norm: Callable[[], nn.Module],
        placement: Placement = "pre",
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if placement not in _FORMULAS:
            raise OptionError(f"Residual: placement={placement!r}; wanted one of {', '.join(map(repr, _FORMULAS))}")
        self.sublayer, self.norm, self.placement = sublayer, norm(), placement
        self.norm_after = norm() if placement == "sandwich" else None
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
        branch = self.sublayer(self.norm(input) if self.placement in ("pre", "sandwich") else input, *args, **kwargs)
        if self.placement == "branch":
            branch = self.norm(branch)
        if self.norm_after is not None:
            branch = self.norm_after(branch)
        y = input + self.dropout(branch)
        return self.norm(y) if self.placement == "post" else y

    def extra_repr(self) -> str:
        return f"{self.placement!r}: {_FORMULAS[self.placement]}"
