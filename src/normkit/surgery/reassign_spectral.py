"""Hard spectral normalization: weights are divided by their largest singular value in place, after an optimizer's step."""

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.errors import OptionError, SurgeryError
from normkit.core.moments import accumulation_dtype
from normkit.surgery.changes import label
from normkit.surgery.select import Where, select, weight_names
from normkit.weights.layout import hooked_weight, weight_layout
from normkit.weights.spectral_norm import power_iteration

# As many as spectral_norm's at the start, where no vectors are kept yet.
_FIRST = 15


@torch.no_grad()
def reassign_spectral_(
    model: nn.Module,
    where: Where = "all",
    *,
    exact: bool = True,
    only_above_one: bool = False,
    n_power_iterations: int = 1,
    memory: MutableMapping[str, tuple[Tensor, Tensor]] | None = None,
    eps: float = 1e-12,
) -> dict[str, Tensor]:
    """W <- W / sigma(W) for every chosen weight, in place; sigma is the largest singular value of its 2-D unfolding.

    To be called after each step of a discriminator's optimizer, of which it is a part: no change of the model, and not undone.
    Afterwards each layer is Lipschitz with constant 1, and so is a network of them with activations such as ReLU. The gradient
    knows nothing of it, other than with ``spectral_norm``. Of a convolution it bounds the unfolding, not the operator.

    Without ``exact``, sigma is u^T W v by power iteration, which comes from below: the norm may stay somewhat above 1. Vectors
    are taken from ``memory`` and left there: keep one dict between calls, and one iteration per call follows a weight that
    changes slowly. Without it each call starts at random with 15.

    Args:
        model: a layer, or any module.
        where: which layers, as in ``select``. Default: ``"all"``.
        exact: by singular value decomposition. Default: True.
        only_above_one: W / max(1, sigma), so that smaller weights stay as they are. Default: False.
        n_power_iterations: of a call that finds vectors in ``memory``. Default: 1.
        memory: u and v by the weight's name; read and written. Default: None.
        eps: floor of sigma. Default: 1e-12.

    Returns sigma before, by the weight's name.

    Raises:
        SurgeryError: nothing is chosen, or a chosen weight is parametrized; nothing was changed.
        OptionError: no iteration, or memory together with ``exact``.

    Reference: Miyato, Kataoka, Koyama, Yoshida (2018), https://arxiv.org/abs/1802.05957.

    >>> layer = nn.Linear(2, 2)
    >>> layer.weight.data = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    >>> reassign_spectral_(layer)
    {'weight': tensor(4.)}
    """
    if exact and memory is not None:
        raise OptionError("reassign_spectral_: exact keeps no vectors; leave memory out, or give exact=False")
    if n_power_iterations < 1:
        raise OptionError(f"reassign_spectral_: n_power_iterations={n_power_iterations}; wanted a whole number from 1")
    chosen = [(name, layer, key) for name, layer in select(model, where).items() for key in weight_names(layer)]
    for name, layer, key in chosen:
        if parametrize.is_parametrized(layer, key):
            raise SurgeryError(
                f"{label(name)}: its {key} is parametrized, and has no value of its own to reassign; bake it in with "
                "fold(model) first, or choose other layers with where="
            )
        hooked = hooked_weight(layer, key)
        if hooked is not None:
            raise SurgeryError(
                f"{label(name)}: its {key} is made by {hooked[0]}; remove that first, or leave it out with where="
            )
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, layer, key in chosen:
        weight = layer.get_parameter(key)
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        full = f"{name}.{key}".lstrip(".")
        matrix = weight_layout(layer, key).matrix(weight).to(accumulation_dtype(weight.dtype))
        if exact:
            sigma = torch.linalg.matrix_norm(matrix, 2)
        else:
            kept = (memory or {}).get(full)
            u, v = power_iteration(matrix, *(kept or (None, None)), n_power_iterations if kept else _FIRST, eps)
            sigma = u @ matrix @ v
            if memory is not None:
                memory[full] = u, v
        found[full] = sigma
        weight.copy_(weight / sigma.clamp_min(1.0 if only_above_one else eps))
    return found
