"""Weight conditioning on a whole model."""

from __future__ import annotations

from typing import Any

from torch import nn

from normkit.surgery.attach import attach_all
from normkit.surgery.changes import Changes
from normkit.surgery.select import Where, select
from normkit.surgery.transaction import all_or_nothing
from normkit.weights.weight_conditioning import weight_conditioning


def condition(
    model: nn.Module, mode: str = "row", where: Where = "first_last", example: Any = None, **options: Any
) -> Changes:
    """Condition the weights of a model's layers, in place: each is divided by the norms of its rows, columns or both.

    Make the optimizer before or afterwards as you like: the raw weights stay the same parameters. In a trained network the
    running statistics of a norm right behind such a layer are carried along, so that in evaluation it computes what it did up
    to its eps; where they can't be, the row says which are those of the old weight.

    Args:
        model: any module.
        mode: ``"row"``, ``"col"`` or ``"rowcol"``. Default: ``"row"``.
        where: as in ``select``; the paper conditions the first and the last layer. Default: ``"first_last"``.
        example: an input, as for ``apply_recipe``. Without it, statistics behind a Linear are carried along only where the norm
            takes features last, as another one may read another axis. Default: None.
        **options: of ``weight_conditioning``.

    Returns:
        The model and a row per weight.

    Raises:
        NotationError: ``where`` can't be read.
        SurgeryError: nothing is chosen, or a layer can't be conditioned; the model is left as it was.

    Reference:
        Saratchandran, Wang, Lucey, "Weight Conditioning for Smooth Optimization of Neural Networks" (2024),
        https://arxiv.org/abs/2409.03424.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(condition(model, where="re:^2$"))
    layer  before      after                    note
    2      Linear 2x8  weight_conditioning:row
    >>> [f"{norm:.3f}" for norm in model[2].weight.norm(dim=1).tolist()]
    ['1.000', '1.000']
    """

    def put(layer: nn.Module, name: str) -> object:
        return weight_conditioning(layer, mode, name=name, **options)  # pyright: ignore[reportArgumentType]

    layers = select(model, where)
    with all_or_nothing(model):
        rows = attach_all(model, layers, put, f"weight_conditioning:{mode}", example)
    return Changes(model, tuple(rows))
