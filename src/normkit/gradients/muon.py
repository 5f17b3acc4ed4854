"""Muon and its relatives: step a matrix along its orthogonalized momentum, equilibrated before or normalized after."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, check_options
from normkit.gradients.gradient_normalizer import last_linear
from normkit.weights.layout import WeightLayout, raw_parameters
from normkit.weights.weight_conditioning import equilibrate

Sides = Literal["row", "col", "rowcol"]

# Of the quintic iteration, chosen by Muon's author for the steepest slope at 0; five steps bring singular values to 0.7 to 1.2.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Step each matrix along its orthogonalized momentum; all other parameters step by AdamW.

    For a weight of shape m x n (any layer's as output units x the rest) with gradient g::

        b <- momentum * b + g,   u = g + momentum * b
        u <- D_r^(-1/2) u D_c^(-1/2)     equilibrate: "row" has D_r alone, "col" D_c alone, of the squares of u
        o = U V'  of  u = U S V'         by five Newton-Schulz steps
        o_i <- o_i / (sqrt(v_i) + eps),  v_i <- beta v_i + (1 - beta) mean(o_i^2)      second_moment=beta (NorMuon)
        o_i <- o_i / norm(o_i)           renormalize="row" (Muon+), likewise "col"
        W <- (1 - lr * weight_decay) W - lr * 0.2 * sqrt(max(m, n)) * o

    With ``second_moment``, o is rescaled to the length that orthogonalizing gives, the root of min(m, n).
    ``equilibrate="row"`` is MuonEq, the twin of weight conditioning: the same diagonal on the update instead of the weight.

    Args:
        params: a model, whose hidden weights are then the matrices and whose embeddings, last Linear, gains and biases step by
            AdamW; or parameter groups, where ``"matrices": True`` marks those of two or more axes, and ``"output_axis": 1`` those
            whose second axis indexes output units, as of a transposed convolution, with its ``"groups"``.
        lr: learning rate of all groups. Default: 1e-3.
        momentum: momentum of the matrices. Default: 0.95.
        weight_decay: decoupled weight decay. Default: 0.1.
        equilibrate: ``"row"``, ``"col"``, ``"rowcol"``, or None for plain Muon. Default: None.
        second_moment: beta of NorMuon's second moment of each row (its authors take 0.95), or None. Default: None.
        renormalize: ``"row"`` or ``"col"``, or None. Default: None.
        betas: betas of AdamW. Default: (0.9, 0.95).
        eps: eps of AdamW and of the second moment. Default: 1e-8.

    Raises:
        OptionError: an argument outside its range, or a parameter with fewer than two axes among the matrices.

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
    https://kellerjordan.github.io/posts/muon; Chang, Shi, Zhang et al., "MuonEq: Balancing Before Orthogonalization
    with Lightweight Equilibration" (2026), https://arxiv.org/abs/2603.28254; Li, Liu, Liang, Chen, Zhao, "NorMuon"
    (2025), https://arxiv.org/abs/2510.05491; Zhang et al., "Muon+" (2026), https://arxiv.org/abs/2602.21545. The
    formulas follow abstracts and restatements.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> layer.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    >>> Muon([{"params": [layer.weight], "matrices": True}], lr=1.0, equilibrate="row").step()
    >>> layer.weight.detach()
    tensor([[-0.1970,  0.0000],
            [ 0.0000,  0.0000]])
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        equilibrate: Sides | None = None,
        second_moment: float | None = None,
        renormalize: Literal["row", "col"] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and eps > 0):
            raise OptionError(f"Muon: lr={lr}, weight_decay={weight_decay}, eps={eps}; wanted from 0, and eps above 0")
        for name, value in (("momentum", momentum), ("second_moment", second_moment or 0.0), ("betas", max(betas))):
            if not 0 <= value < 1:
                raise OptionError(f"Muon: {name}={value}; wanted a number from 0 to below 1")
        check_options("Muon", equilibrate=(equilibrate, (None, *get_args(Sides))))
        check_options("Muon", renormalize=(renormalize, (None, "row", "col")))
        options = {"momentum": momentum, "equilibrate": equilibrate}
        groups = matrix_groups(params) if isinstance(params, nn.Module) else params
        shared = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        shared |= {"second_moment": second_moment, "renormalize": renormalize}
        super().__init__(groups, {"matrices": False, "output_axis": 0, "groups": 1, **shared, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see ``params``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        thin = [tuple(p.shape) for p in group["params"] if p.dim() < 2]
        if group["matrices"] and thin:
            raise OptionError(f"Muon: a parameter of shape {thin[0]} among the matrices; put it into another group")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every parameter that has a gradient; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not group["matrices"]:
                self._by_adamw(moving, group)
                continue
            for parameter in moving:
                direction = _along_matrix(parameter, self.state[parameter], group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        return loss

    def _by_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=torch.tensor(0.0), **zeros)
        averages, squares, steps = (
            [self.state[parameter][key] for parameter in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        options = {key: group[key] for key in ("lr", "weight_decay", "eps")}
        beta1, beta2 = group["betas"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        adamw(
            parameters, gradients, averages, squares, [], steps,
            has_complex=any(map(torch.is_complex, parameters)), amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, **options,
        )  # fmt: skip


def matrix_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split a model's parameters into matrices and others: embeddings, the last Linear, and parameters of fewer than two axes.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))
    >>> [(len(group["params"]), group["matrices"]) for group in matrix_groups(model)]
    [(1, True), (6, False)]
    """
    skip = last_linear(model)
    chosen: dict[tuple[bool, int, int], list[Tensor]] = {}
    for name, layer, parameter, rows in raw_parameters(model):
        key = False, 0, 1
        if rows is not None and not isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and not skip(name, layer):
            key = True, rows.names.index("o") and 1, dict(rows.sizes).get("g", 1)
        chosen.setdefault(key, []).append(parameter)
    # State dicts number parameters in this order, so it does not depend on which kind comes first in the model.
    return [
        {"params": chosen[key], **dict(zip(("matrices", "output_axis", "groups"), key, strict=True))}
        for key in sorted(chosen, key=lambda key: (not key[0], *key[1:]))
    ]


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V' of a matrix U S V' by Newton-Schulz steps in float32, or in bfloat16 on a GPU.

    >>> orthogonalize(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([[0.6888, 0.0000],
            [0.0000, 1.1142]])
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.promote_types(matrix.dtype, torch.float32))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = _bounded(x)
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def _bounded(matrix: Tensor) -> Tensor:
    """A matrix with entries up to 1, as the squares of larger ones may overflow; only its direction counts."""
    return matrix / matrix.abs().amax().clamp_min(1.0) if matrix.numel() else matrix


def muon_eq(momentum: Tensor, sides: Sides = "row") -> Tensor:
    """Equilibrate a matrix of momentum, then orthogonalize it: MuonEq's direction; see Muon.

    >>> muon_eq(torch.tensor([[200.0, 0.0], [0.0, 1.0]]))
    tensor([[1.1081, 0.0000],
            [0.0000, 1.1081]])
    """
    return orthogonalize(equilibrate(_bounded(momentum), sides, order="simultaneous"))


def _along_matrix(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    assert parameter.grad is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
    layout = WeightLayout(group["output_axis"], group["groups"])
    update = layout.matrix(parameter.grad + group["momentum"] * buffer)
    sides = group["equilibrate"]
    update = orthogonalize(update) if sides is None else muon_eq(update, sides)
    if group["second_moment"] is not None:
        beta = group["second_moment"]
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(update[:, :1])
        seen = state["second_moment"].lerp_(update.square().mean(1, keepdim=True), 1 - beta)
        update = update / (seen.sqrt() + group["eps"])
        update = update * (min(update.shape) ** 0.5 / update.norm().clamp_min(group["eps"]))
    if group["renormalize"] is not None:
        update = equilibrate(update, group["renormalize"])
    update = update * (0.2 * max(update.shape) ** 0.5)
    if not layout.output_axis:
        return update.view_as(parameter)
    inputs, outputs, *taps = parameter.shape
    return update.view(layout.groups, outputs, inputs // layout.groups, *taps).transpose(1, 2).reshape(parameter.shape)


CARD = Card(
    name="muon_eq",
    title="Equilibrated Muon (MuonEq)",
    kind="gradient",
    normalized_over="the rows, columns or both of each matrix's momentum, before it is orthogonalized",
    formula="W <- W - lr * 0.2 sqrt(max(m, n)) * UV',  U S V' = D_r^(-1/2) b D_c^(-1/2)",
    paper=paper("chang2026muoneq"),
    use_cases="hidden weights of transformers, instead of AdamW",
    strengths="the diagonal of weight conditioning on the update: a better start for the Newton-Schulz steps",
    weaknesses="matrix products at every step; embeddings, head, gains and biases still need AdamW",
    module=Muon,
    functional=muon_eq,
    make=lambda model: Muon(model, equilibrate="row"),
)
