"""Weight conditioning on a whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normkit.surgery.attach import attach_all
from normkit.surgery.changes import Changes, Refusal, Refusals
from normkit.surgery.select import Where, select
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import try_on
from normkit.weights.weight_conditioning import weight_conditioning


def condition(
    model: nn.Module,
    mode: str = "row",
    where: Where = "first_last",
    example: Any = None,
    *,
    on_refusal: Refusal = "raise",
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
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
            takes features last, as another one may read another axis. With it, a weight that the model does not read on it is
            refused. Default: None.
        on_refusal: of a layer that can't be conditioned: ``"raise"``, or ``"leave"`` it as it is. Default: ``"raise"``.
        optimizer: of the model's parameters, which follows where a parameter is replaced. Default: None.
        **options: of ``weight_conditioning``.

    Returns:
        The model, a row per weight, what was passed over with the reason, and the way back.

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

    layers, refusals = select(model, where), Refusals("condition", on_refusal)
    with transaction(model, optimizer) as opened:
        rows = attach_all(model, layers, put, f"weight_conditioning:{mode}", example, refusals)
        if example is not None:
            try_on(model, example)
        return opened.close(model, rows, refusals)
