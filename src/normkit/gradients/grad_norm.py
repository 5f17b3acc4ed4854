"""GradNorm: weights for a sum of losses with which all tasks train at a similar pace."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.moments import accumulation_dtype

Path = Literal["exact", "autograd"]
Step = Literal["multiplicative", "additive"]


class Balance(NamedTuple):
    """Each task's gradient norm G and its target, and the derivative of their distance with respect to the weights."""

    norms: Tensor
    targets: Tensor
    slopes: Tensor


class GradNorm(nn.Module):
    """Weight the losses of several tasks so that their gradients at a shared layer are balanced.

    L = sum_i w_i L_i. With G_i = ||d(w_i L_i)/dW|| of the last shared weights W, the rate at which task i lags behind
    r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0)), and the target t_i = mean_j(G_j) r_i^alpha held constant, the weights take one
    step down sum_i |G_i - t_i| and are scaled so that sum_i w_i = tasks. As G_i = w_i ||dL_i/dW||, the slope is
    sign(G_i - t_i) ||dL_i/dW|| exactly, and needs no second derivative: ``path="exact"``. ``path="autograd"`` differentiates
    the norms instead, and agrees.

    The step ``"additive"``, as published, follows the slopes: w_i <- w_i - rate slope_i. It oscillates where one loss is a
    hundred times another; then use ``"multiplicative"``, which descends the same distance, relative to the mean norm, in log
    w_i: w_i <- w_i exp(-rate w_i slope_i / mean_j(G_j)). It is scale-free, and weights stay above 0.

    Call it on the losses instead of adding them; it returns the sum to differentiate, with the weights before the step, and in
    training steps the weights, which are buffers that an optimizer does not touch.

    A task whose first loss is 0 counts as keeping pace until its loss is above 0, which then counts as its first. A step in
    which a loss or a norm is not finite leaves the weights unchanged.

    Args:
        tasks: number of losses.
        alpha: restoring force: 0 makes all norms equal, larger values push tasks that lag behind. Default: 1.5.
        rate: step size for the weights. Default: 0.025.
        step: ``"additive"`` or ``"multiplicative"``. Default: ``"additive"``.
        minimum: smallest weight, before they are scaled. Default: 1e-6.
        path: ``"exact"`` or ``"autograd"``. Default: ``"exact"``.

    Shape: (tasks,) or a sequence of scalars; the output is a scalar.

    Raises:
        OptionError: an option outside its range, or a first loss that is negative.
        ShapeError: another number of losses.

    Reference: Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm" (2018), https://arxiv.org/abs/1711.02257.

    >>> shared = nn.Parameter(torch.ones(1))
    >>> balance = GradNorm(2, alpha=0.0, rate=0.1, step="additive")
    >>> total = balance([shared.sum(), 3 * shared.sum()], shared)
    >>> total.item(), balance.weights
    (4.0, tensor([1.2222, 0.7778]))
    """

    weights: Tensor
    initial: Tensor

    def __init__(
        self,
        tasks: int,
        alpha: float = 1.5,
        rate: float = 0.025,
        *,
        step: Step = "additive",
        minimum: float = 1e-6,
        path: Path = "exact",
    ) -> None:
        super().__init__()
        if tasks < 1 or not alpha >= 0 or not rate >= 0 or not 0 < minimum < 1:
            raise OptionError(
                f"GradNorm: tasks={tasks}, alpha={alpha}, rate={rate}, minimum={minimum}; wanted tasks from 1, alpha and rate "
                "from 0, a minimum between 0 and 1"
            )
        check_options("GradNorm", path=(path, Path), step=(step, Step))
        self.alpha, self.rate, self.minimum = alpha, rate, minimum
        self.path: Path = path
        self.step: Step = step
        self.register_buffer("weights", torch.ones(tasks))
        self.register_buffer("initial", torch.zeros(tasks))

    def forward(self, losses: Tensor | Sequence[Tensor], shared: Tensor | Iterable[Tensor]) -> Tensor:
        """Compute the weighted sum of the losses; in training, then step the weights.

        Args:
            losses: one scalar per task, each computed through the shared parameters.
            shared: the parameters at which gradients are compared: the last layer that all tasks share.

        Returns the sum, on which to call ``backward``; its weights are constants.
        """
        stacked = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
        if stacked.shape != self.weights.shape:
            raise ShapeError(
                f"GradNorm: losses of {tuple(stacked.shape)}, wanted a scalar for each of {len(self.weights)} tasks"
            )
        total = (self.weights.to(stacked.dtype) * stacked).sum()
        if self.training and torch.is_grad_enabled():
            self._note(stacked.detach())
            found = grad_norm(losses, shared, self.weights, self.initial, self.alpha, path=self.path)
            self._step(found)
        return total

    @torch.no_grad()
    def _note(self, losses: Tensor) -> None:
        fresh = (self.initial == 0) & losses.isfinite()
        if bool((fresh & (losses < 0)).any()):
            raise OptionError(
                f"GradNorm: first losses {losses.tolist()}; a task's pace is its loss relative to the first, which a negative "
                "one does not give; add a constant that makes losses positive"
            )
        self.initial = torch.where(fresh, losses.to(self.initial.dtype), self.initial)

    @torch.no_grad()
    def _step(self, found: Balance) -> None:
        weights = self.weights.to(found.slopes.dtype)
        if self.step == "multiplicative":
            mean = found.norms.mean()
            push = found.slopes * weights / torch.where(mean > 0, mean, 1.0)
            stepped = weights * torch.exp(-self.rate * push)
        else:
            stepped = weights - self.rate * found.slopes
        stepped = stepped.clamp_min(self.minimum)
        stepped = stepped * (len(stepped) / stepped.sum())
        known = found.slopes.isfinite().all() & found.targets.isfinite().all() & found.norms.isfinite().all()
        self.weights = torch.where(known, stepped, weights).to(self.weights.dtype)

    def extra_repr(self) -> str:
        return (
            f"{len(self.weights)}, alpha={self.alpha}, rate={self.rate}, step={self.step!r}, "
            f"minimum={self.minimum}, path={self.path!r}"
        )


def grad_norm(
    losses: Tensor | Sequence[Tensor],
    shared: Tensor | Iterable[Tensor],
    weights: Tensor,
    initial: Tensor,
    alpha: float = 1.5,
    *,
    path: Path = "exact",
) -> Balance:
    """Compute gradient norms, their targets, and the slope of sum_i |G_i - t_i| for each weight; see GradNorm.

    Of one scalar loss per task at the ``shared`` parameters, with the tasks' ``weights`` and ``initial`` losses; ``alpha`` and
    ``path`` are those of GradNorm. All is detached; the losses can still be differentiated.

    Raises:
        OptionError: a loss does not depend on any shared parameter that requires a gradient.

    >>> shared = nn.Parameter(torch.ones(1))
    >>> grad_norm([shared.sum(), 3 * shared.sum()], shared, torch.ones(2), torch.ones(2), alpha=0.0)
    Balance(norms=tensor([1., 3.]), targets=tensor([2., 2.]), slopes=tensor([-1.,  3.]))
    """
    parameters = [shared] if isinstance(shared, Tensor) else list(shared)
    scalars = list(losses.unbind() if isinstance(losses, Tensor) else losses)
    dtype = accumulation_dtype(scalars[0].dtype)
    weights, losses = weights.detach().to(dtype), torch.stack(scalars).detach().to(dtype)
    initial = initial.to(dtype)
    known = initial > 0  # where not, the rate at which a task lags behind is 1
    ratio = (losses / torch.where(known, initial, 1.0)).clamp_min(0)
    mean = torch.where(known, ratio, 0.0).sum() / known.sum().clamp_min(1)
    pace = torch.where(known & (mean > 0), ratio / torch.where(mean > 0, mean, 1.0), 1.0) ** alpha
    if path == "exact":
        bare = torch.stack([_norm(loss, parameters, dtype) for loss in scalars])
        norms = weights * bare
        targets = norms.mean() * pace
        return Balance(norms, targets, (norms - targets).sign() * bare)
    with torch.enable_grad():
        leaf = weights.clone().requires_grad_()
        scaled = [weight.to(loss.dtype) * loss for weight, loss in zip(leaf, scalars, strict=True)]
        norms = torch.stack([_norm(loss, parameters, dtype, create_graph=True) for loss in scaled])
        targets = norms.detach().mean() * pace
        (slopes,) = torch.autograd.grad((norms - targets).abs().sum(), leaf, retain_graph=True)
    return Balance(norms.detach(), targets, slopes)


def _norm(loss: Tensor, parameters: list[Tensor], dtype: torch.dtype, create_graph: bool = False) -> Tensor:
    try:
        gradients = torch.autograd.grad(
            loss, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        gradients = (None,)
    parts = [gradient.flatten().to(dtype) for gradient in gradients if gradient is not None]
    if not parts:
        raise OptionError(
            "GradNorm: a loss does not depend on any shared parameter; give the parameters of the last layer that all tasks "
            "share, and losses that were not detached"
        )
    return torch.linalg.vector_norm(torch.cat(parts))


CARD = Card(
    title="GradNorm",
    kind="gradient",
    normalized_over="each task's gradient at the last shared layer",
    formula="minimize sum_i |G_i - mean(G) r_i^alpha| by w, where G_i = ||d(w_i L_i)/dW|| and sum_i w_i = tasks",
    paper=paper("chen2018gradnorm"),
    use_cases="multi-task networks whose losses differ in scale and pace",
    strengths="one number alpha instead of a search over the weights of all losses",
    weaknesses="one backward pass to the shared layer per task; noisy for few samples per batch",
    module=GradNorm,
    functional=grad_norm,
    make=lambda model: GradNorm(2),
    running_state=True,
)
