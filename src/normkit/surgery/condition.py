"""Weight conditioning on a whole model."""

from functools import partial
from typing import Any

import torch
from torch import nn

from normkit.core.errors import OptionError
from normkit.surgery.attach import attach_all
from normkit.surgery.changes import Changes, Refusal, Refusals
from normkit.surgery.select import Where, select
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import try_on
from normkit.weights.preconditioning import Preconditioner, inverse_root_diagonal, precondition, spectral_conditioning
from normkit.weights.weight_conditioning import weight_conditioning


def condition(
    model: nn.Module,
    mode: str = "row",
    where: Where | None = None,
    example: Any = None,
    *,
    left: Preconditioner | None = None,
    right: Preconditioner | None = None,
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
        mode: ``"row"``, ``"col"`` or ``"rowcol"``; ``"jacobi"``, from the left, or ``"symmetric_jacobi"``, D^(-1/2) A D^(-1/2),
            for square weights; ``"spectral"``, which adds a multiple of the identity. Default: ``"row"``.
        where: as in ``select``. Default: ``"first_last"``, as in the paper; ``"attention"`` for ``"spectral"``.
        example: an input, as for ``apply_recipe``. Without it, statistics behind a Linear are carried along only where the norm
            takes features last, as another one may read another axis. With it, a weight that the model does not read on it is
            refused. Default: None.
        left: a preconditioner of one's own in place of the mode's, a tensor or a function of the weight's matrix, as for
            ``normkit.weights.precondition``. Default: None.
        right: likewise, from the right. Default: None.
        on_refusal: of a layer that can't be conditioned: ``"raise"``, or ``"leave"`` it as it is. Default: ``"raise"``.
        optimizer: of the model's parameters, which follows where a parameter is replaced. Default: None.
        **options: of ``weight_conditioning``; of ``spectral_conditioning`` or ``precondition`` where these are meant.

    Raises:
        NotationError: ``where`` can't be read.
        OptionError: both a mode and a preconditioner of one's own.
        SurgeryError: nothing is chosen, or a layer can't be conditioned; the model is left as it was.

    Reference: Saratchandran, Wang, Lucey (2024), https://arxiv.org/abs/2409.03424.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(condition(model, where="re:^2$"))
    layer  before      after                    note
    2      Linear 2x8  weight_conditioning:row
    >>> [f"{norm:.3f}" for norm in model[2].weight.norm(dim=1).tolist()]
    ['1.000', '1.000']
    """
    own = left is not None or right is not None
    if own and mode != "row":
        raise OptionError(f"condition: got mode={mode!r} and a preconditioner; wanted one of them")
    what, put = f"weight_conditioning:{mode}", partial(weight_conditioning, mode=mode, **options)
    if own:
        what, put = "preconditioning", partial(precondition, left=left, right=right, **options)
    elif mode == "symmetric_jacobi":
        both = inverse_root_diagonal
        what, put = "preconditioning:jacobi", partial(precondition, left=both, right=both, **options)
    elif mode == "spectral":
        what, put = "spectral_conditioning", partial(spectral_conditioning, **options)
    where = where if where is not None else "attention" if mode == "spectral" else "first_last"
    layers, refusals = select(model, where), Refusals("condition", on_refusal)
    with transaction(model, optimizer) as opened:
        rows = attach_all(model, layers, lambda layer, name: put(layer, name=name), what, example, refusals)
        if example is not None:
            try_on(model, example)
        return opened.close(model, rows, refusals)
