"""The second derivative of a loss by a model's parameters, as products with vectors.

Reference: Pearlmutter, "Fast Exact Multiplication by the Hessian" (1994), https://doi.org/10.1162/neco.1994.6.1.147;
Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent" (2002),
https://doi.org/10.1162/08997660260028683.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normkit.core.errors import OptionError, check_options
from normkit.diagnostics.subject import refuse_lazy, refuse_reentrant
from normkit.surgery.bake import bake
from normkit.surgery.watch import forked, run_on

Loss = Callable[[Any, Any], Tensor]
Batches = Iterable[tuple[Any, Any]]


class Options(TypedDict, total=False):
    """What every function here takes."""

    matrix: Literal["hessian", "ggn"]  # ``"hessian"`` or ``"ggn"``. Default: "hessian".
    by: Literal["raw", "effective"]  # ``"raw"`` or ``"effective"`` parameters. Default: "raw".
    # Of the computation. Default: the parameters', float32 for half types; of whole matrices float64.
    dtype: torch.dtype | None
    # Called as ``progress(done, total)`` after each product with a vector. Default: None.
    progress: Callable[[int, int], object] | None


class Curvature:
    """A loss on a copy of a model: its value, gradient, and products of its second derivative with vectors."""

    def __init__(
        self, who: str, model: nn.Module, loss: Loss, batches: Batches, total: int, **options: Unpack[Options]
    ) -> None:
        matrix, by = options.get("matrix", "hessian"), options.get("by", "raw")
        check_options(who, matrix=(matrix, ("hessian", "ggn")), by=(by, ("raw", "effective")))
        refuse_lazy(model, who)
        if isinstance(batches, Iterator):
            raise OptionError(f"{who}: the batches can be walked only once; give a list of them, or a loader")
        self.model, self.loss, self.batches, self.who = copy.deepcopy(model), loss, batches, who
        if by == "effective":
            bake(self.model)
        narrow = any(parameter.dtype.itemsize < 4 for parameter in self.model.parameters())
        self.model.to(options.get("dtype") or (torch.float32 if narrow else None))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise OptionError(f"{who}: no parameter of the model is trained, so that the loss has no curvature")
        self.like, self.size = self.parameters[0], sum(parameter.numel() for parameter in self.parameters)
        self.total, self.progress, self._done = total, options.get("progress"), 0
        self._second = self._hessian if matrix == "hessian" else self._gauss_newton
        self._kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._sizes = [len(target) if getattr(target, "ndim", 0) else 1 for _, target in batches]
        if not sum(self._sizes):
            raise OptionError(f"{who}: there are no batches, or no examples in them")

    def random(self, generator: torch.Generator) -> Tensor:
        """A vector of independent normal elements."""
        return torch.randn(self.size, generator=generator, dtype=self.like.dtype).to(self.like.device)

    def gradient(self) -> tuple[float, Tensor]:
        """The loss and its gradient."""
        total, whole = 0.0, torch.zeros(self.size, dtype=self.like.dtype, device=self.like.device)
        for share, _, loss in self._passes():
            total += share * loss.item()
            whole += share * self._flat(_grad(loss, self.parameters))
        return total, whole

    def times(self, vectors: Tensor) -> Tensor:
        """The matrix times a vector, or times each of the rows given."""
        whole = torch.zeros_like(vectors)
        for share, output, loss in self._passes():
            whole += share * self._second(output, loss, vectors)
        if not whole.isfinite().all():
            raise OptionError(f"{self.who}: the loss or a derivative is not finite; look at the loss on each batch")
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, self.total)
        return whole

    def _hessian(self, output: Tensor, loss: Tensor, vectors: Tensor) -> Tensor:
        gradient = self._flat(_grad(loss, self.parameters, create_graph=True))
        return self._flat(_grad(gradient, self.parameters, vectors))

    def _gauss_newton(self, output: Tensor, loss: Tensor, vectors: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise OptionError(f"{self.who}: the model gives a {type(output).__name__}; matrix='ggn' wants a tensor")
        (outer,) = _grad(loss, [output], create_graph=True)
        # J v as the derivative of u' J v by u: it takes no forward mode, which not every operator has.
        u = torch.zeros_like(output, requires_grad=True)
        (forward,) = _grad(self._flat(_grad(output, self.parameters, u, create_graph=True)), [u], vectors)
        (curved,) = _grad(outer, [output], forward)
        return self._flat(_grad(output, self.parameters, curved))

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        """One vector, or a row for each of a batch of gradients."""
        lead = parts[0].shape[: parts[0].dim() - self.like.dim()]
        return torch.cat([part.reshape(*lead, -1) for part in parts], dim=-1)

    def _without_cudnn(self) -> AbstractContextManager[Any]:
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()

    def _passes(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Share of each batch in the mean, the output and the loss."""
        for size, (given, target) in zip(self._sizes, self.batches, strict=True):
            with torch.no_grad():  # before a pass, as the graph of the last one holds what it read
                for buffer, value in self._kept:
                    buffer.copy_(value)
            # Fused attention and cuDNN's recurrent layers have no second derivative.
            with forked() as seed, sdpa_kernel(SDPBackend.MATH), self._without_cudnn(), torch.enable_grad():
                seed()
                output = run_on(self.model, _placed(given, self.like))
                loss = self.loss(output, _placed(target, self.like))
            refuse_reentrant(loss, self.who)
            yield size / sum(self._sizes), output, loss


def _grad(of: Tensor, by: Sequence[Tensor], vectors: Tensor | None = None, create_graph: bool = False) -> list[Tensor]:
    """Gradients, zero where there is no way; a batch of them where vectors have one axis more."""
    batched = vectors is not None and vectors.dim() > of.dim()
    lead = vectors.shape[:1] if vectors is not None and batched else ()
    found: Sequence[Tensor | None] = [None] * len(by)
    if of.requires_grad:
        how: dict[str, Any] = {"retain_graph": True, "create_graph": create_graph, "is_grads_batched": batched}
        found = torch.autograd.grad(of, by, vectors, allow_unused=True, **how)
    return [
        each.new_zeros((*lead, *each.shape)) if part is None else part for part, each in zip(found, by, strict=True)
    ]


def _placed(value: Any, like: Tensor) -> Any:
    """Tensors on the device of the parameters, floating ones in their dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: _placed(part, like) for key, part in value.items()}
    return type(value)(_placed(part, like) for part in value) if isinstance(value, list | tuple) else value
