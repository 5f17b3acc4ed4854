"""Weight conditioning on a whole model, how any weight method is put on chosen layers, and what becomes of running statistics."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.activations.batch_renorm import BatchRenorm
from normkit.core.errors import NormkitError, OptionError, SurgeryError
from normkit.core.support import show
from normkit.surgery.bake import value_of
from normkit.surgery.changes import Change, Changes, Refusal, Refusals, label
from normkit.surgery.select import Where, select, weight_names
from normkit.surgery.substitute import refuse
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import try_on
from normkit.weights.layout import hooked_weight, weight_layout
from normkit.weights.preconditioning import Preconditioner, inverse_root_diagonal, precondition, spectral_conditioning
from normkit.weights.weight_conditioning import weight_conditioning

# In evaluation one mean and one deviation per channel, which it has kept.
_KINDS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, BatchGroupNorm, BatchRenorm)
_POWERS = {"running_var": 2, "running_std": 1}
_CURE = "call recalibrate(model, batches) before evaluation"


class Statistics:
    """The trained running statistics of a model, and which layers they lie behind; false where there are none.

    Of a layer z = W x + b whose rows are scaled by s > 0, the new output is s (z - b) + b: a norm that has kept the mean and the
    variance of z is right for it with s (mean - b) + b and s^2 var, up to its eps.
    """

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        self._names = {module: name for name, module in model.named_modules() if _is_trained(module)}
        self._calls = _calls(model) if self._names else None
        seen = try_on(model, example, self._names, "model").shapes if self._names and example is not None else {}
        self._ranks = {norm: len(seen[id(norm)]) for norm in self._names if id(norm) in seen}
        self._norms = {call: norm for norm in self._names for call in (self._calls or {}).get(norm, [])}

    def __bool__(self) -> bool:
        return bool(self._names)

    def carry(self, layer: nn.Module, name: str, before: Tensor, after: Tensor) -> str:
        """Carry the statistics behind a layer along with its weight; return what there is to know, or nothing."""
        factors = _factors(before, after, layer, name)
        if factors is not None and bool(((factors - 1).abs() <= 4 * torch.finfo(before.dtype).eps).all()):
            return ""
        if self._calls is None:
            return f"running statistics behind it, if there are any, are those of the weight before; {_CURE}"
        calls = self._calls.get(layer, [])
        norm = self._next(calls)
        if norm is not None and factors is not None and _fits(layer, norm, factors, self._ranks.get(norm)):
            _rescale(norm, factors, getattr(layer, "bias", None))
            return f"running statistics of {label(self._names[norm])} carried along"
        stale = [name for norm, name in self._names.items() if norm in self._behind(calls)]
        if not stale:
            return ""
        shown = ", ".join(stale[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
        return f"running statistics of {shown} are those of the weight before; {_CURE}"

    def _next(self, calls: list[fx.Node]) -> nn.Module | None:
        """The one norm that reads all that a layer gives, and nothing else."""
        readers = [reader for call in calls for reader in call.users]
        norms = {self._norms.get(reader) for reader in readers}
        norm = norms.pop() if len(norms) == 1 and len(readers) == len(calls) else None
        heard = [call for call, found in self._norms.items() if found is norm]
        return norm if set(heard) == set(readers) and all(call.all_input_nodes[0] in calls for call in heard) else None

    def _behind(self, calls: list[fx.Node]) -> set[nn.Module]:
        seen, left = set(calls), list(calls)
        while left:
            new = [reader for reader in left.pop().users if reader not in seen]
            seen.update(new)
            left += new
        return {self._norms[call] for call in seen if call in self._norms}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


def _calls(model: nn.Module) -> dict[nn.Module, list[fx.Node]] | None:
    """The calls of each module, as tracing the model's forward shows them; None where that can't be traced."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever the forward of a model says to inputs that are no tensors
        return None
    found: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(model.get_submodule(str(node.target)), []).append(node)
    return found


def _is_trained(module: nn.Module) -> bool:
    """Whether a module keeps running statistics that are no longer those it was made with."""
    mean = module._buffers.get("running_mean")
    if not isinstance(mean, Tensor) or mean.is_meta:
        return False
    kept = [(mean, 0.0)] + [(v, 1.0) for key in _POWERS if (v := module._buffers.get(key)) is not None]
    return any(bool((values != start).any()) for values, start in kept)


def _factors(before: Tensor, after: Tensor, layer: nn.Module, name: str) -> Tensor | None:
    """What each output unit's weights were multiplied by, in float64; None where that is not one positive number each."""
    if before.shape != after.shape or name != "weight" or before.dim() < 2:
        return None
    split = weight_layout(layer, name).rows.split(before.shape)
    a, b = (value.double().reshape(split.shape) for value in (before, after))
    total = a.square().sum(split.dims, keepdim=True)
    factors = torch.where(total > 0, (a * b).sum(split.dims, keepdim=True) / total, 1.0)
    # Each element is rounded a few times.
    rest = torch.linalg.vector_norm(b - factors * a, dim=split.dims)
    fits = rest <= 8 * torch.finfo(before.dtype).eps * torch.linalg.vector_norm(b, dim=split.dims)
    return factors.flatten() if bool(fits.all() & (factors > 0).all()) else None


def _fits(layer: nn.Module, norm: nn.Module, factors: Tensor, rank: int | None) -> bool:
    """Whether a norm, for an input of that rank if it is known, keeps the statistics of each output unit of the layer."""
    if not isinstance(layer, nn.Linear | nn.Bilinear | _ConvNd) or layer._forward_hooks or norm._forward_pre_hooks:
        return False
    known = isinstance(norm, _KINDS) or type(norm).__name__.endswith("FrozenBatchNorm2d")  # torchvision's, detectors'
    first = getattr(norm, "layout", "n c *") == "n c *"
    if isinstance(layer, _ConvNd):
        same = first and rank in (None, 2 + len(layer.kernel_size))
    else:  # gives units last, which is where a norm of axis 1 looks in (N, C) alone; to an instance norm that is (C, positions)
        same = not first or (rank == 2 and not isinstance(norm, nn.modules.instancenorm._InstanceNorm))
    return known and same and norm.get_buffer("running_mean").shape == factors.shape


@torch.no_grad()
def _rescale(norm: nn.Module, factors: Tensor, bias: Any) -> None:
    """In new buffers, as those that were there may be put back."""
    mean = norm.get_buffer("running_mean")
    shift = bias.detach().double() if isinstance(bias, Tensor) else 0.0
    norm._buffers["running_mean"] = ((mean.double() - shift) * factors + shift).to(mean.dtype)
    for key, power in _POWERS.items():
        kept = norm._buffers.get(key)
        if kept is not None:
            norm._buffers[key] = (kept.double() * factors**power).to(kept.dtype)


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


Attach = Callable[[nn.Module, str], object]


def attach_all(
    model: nn.Module, layers: Mapping[str, nn.Module], put: Attach, what: str, example: Any, refusals: Refusals
) -> list[Change]:
    """Put a weight method on every weight of some layers, and carry running statistics along; a row each. In a transaction."""
    ties, statistics = tied_parameters(model), Statistics(model, example)
    sight = None if example is None else try_on(model, example, layers.values(), "model")
    rows = []
    for name, layer in layers.items():
        for weight in weight_names(layer):
            full = label(name) if weight == "weight" else f"{label(name)}.{weight}".removeprefix("(model).")
            hooked = hooked_weight(layer, weight)
            if hooked is not None:
                refusals.leave(full, f"its weight is made by {hooked[0]}; remove that first")
                continue
            try:
                if sight is not None:
                    refuse(full, sight.why_unread(layer, weight))
                with transaction(layer):
                    rows.append(_attach_one(layer, full, weight, put, what, ties, statistics))
            except SurgeryError as error:
                refusals.take(full, error)
    return rows


def _attach_one(
    layer: nn.Module,
    full: str,
    weight: str,
    put: Attach,
    what: str,
    ties: Mapping[int, list[str]],
    statistics: Statistics,
) -> Change:
    raw = raw_weight(layer, weight)
    before = f"{type(layer).__name__} {show(getattr(layer, weight).shape)}"
    present, value = parametrizations(layer, weight), value_of(layer, weight) if statistics else None
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            put(layer, weight)
    except (NormkitError, ValueError, RuntimeError) as error:
        raise SurgeryError(f"{full}: {what} can't be put on it: {error}") from error
    added = parametrizations(layer, weight)[-1]
    if any(type(other) is type(added) for other in present):
        raise SurgeryError(f"{full}: {what} is on it already; name it once, or bake it in with fold(model) first")
    own = full if weight != "weight" else f"{full}.{weight}".removeprefix("(model).")
    others = [tie for tie in ties.get(id(raw), []) if tie != own]
    if others and all(raw is not parameter for parameter in layer.parameters()):
        raise SurgeryError(
            f"{full}: its weight is tied to {', '.join(others)}, and {what} puts other parameters in its place, which "
            "would untie them; choose other layers with @re:PATTERN"
        )
    stack = [type(other).__name__ for other in present]
    notes = [f"over {' and '.join(stack)}"] if stack else []
    notes += [f"raw weight stays tied to {', '.join(others)}"] if others else []
    if value is not None:
        notes += filter(None, [statistics.carry(layer, weight, value, value_of(layer, weight))])
    for warning in said:
        notes.append(str(warning.message))
        warnings.warn(f"{full}: {warning.message}", warning.category, stacklevel=5)
    return Change(full, before.removeprefix("Parametrized"), what, "; ".join(notes))


def parametrizations(layer: nn.Module, name: str) -> list[nn.Module]:
    """The parametrizations of a layer's weight, innermost first."""
    return list(layer.parametrizations[name]) if parametrize.is_parametrized(layer, name) else []  # pyright: ignore


def raw_weight(layer: nn.Module, name: str) -> Tensor | None:
    """The parameter that holds a weight, under its parametrizations; None where they keep several."""
    if parametrize.is_parametrized(layer, name):
        return getattr(layer.parametrizations[name], "original", None)  # pyright: ignore
    return layer._parameters.get(name)


def tied_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each parameter that several modules hold is found, by the parameter's id."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shown = f"{prefix.replace('_orig_mod.', '')}.{name}".lstrip(".")
                if ".parametrizations." in f".{shown}":
                    shown = f".{shown}".replace(".parametrizations.", ".").removesuffix(".original").lstrip(".")
                names.setdefault(id(parameter), []).append(shown)
    return {key: found for key, found in names.items() if len(found) > 1}
