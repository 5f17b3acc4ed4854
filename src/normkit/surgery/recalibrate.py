"""Running statistics, estimated again, each element counting once."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.activations.batch_norm import MeanOnlyBatchNorm
from normkit.activations.batch_renorm import BatchRenorm, RenormSchedule
from normkit.activations.conditional_norm import ConditionalNorm, SpatiallyAdaptiveNorm
from normkit.activations.recurrent_batch_norm import RecurrentBatchNorm, padding_mask
from normkit.activations.switchable_norm import ExemplarNorm, SwitchableNorm
from normkit.core.errors import OptionError, SurgeryError, check_options
from normkit.core.moments import Moments, moments
from normkit.surgery.changes import Change, Changes, PassedOver, label
from normkit.surgery.freeze import is_frozen
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import modes_kept

Estimator = Literal["population", "mean"]
# Each keeps one mean per channel, over the batch and all positions.
_KINDS = (
    *(nn.modules.batchnorm._BatchNorm, BatchRenorm, BatchGroupNorm, MeanOnlyBatchNorm, RecurrentBatchNorm),
    *(ConditionalNorm, SpatiallyAdaptiveNorm, SwitchableNorm, ExemplarNorm),
)
_KEPT = ("running_mean", "running_var", "running_std")


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    limit: int | None = 200,
    estimator: Estimator = "population",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    across_processes: bool = False,
) -> Changes:
    """Estimate every batch normalization's running statistics again, by its inputs over many batches, in place.

    Weights are fixed; batch normalizations normalize by their batch's own statistics, as in training, while everything else runs
    as in evaluation, so that dropout does not enter. The estimates are

        population    mean and variance over all elements of all batches together, however large each batch is
        mean          the plain averages over batches of their means and unbiased variances

    The population's is exact where the layer's input does not depend on other batch normalizations; a layer that is called
    several times, or stands in several places, sees all its inputs. The model is left in the mode it had, and as it was if a
    batch fails.

    Args:
        model: with batch normalizations that keep running statistics: torch's, and every member of their family here, also those
            that are conditioned on something or mix in other statistics.
        batches: of inputs. A dict is given by name; of a tuple or list the first item, as in (input, target), is given alone.
        limit: batches to take; None for all. Default: 200.
        estimator: ``"population"`` or ``"mean"``. Default: "population".
        forward: ``forward(model, batch)`` runs the model on a batch, in place of the above.
        across_processes: whether the batches of all processes of ``torch.distributed`` count together, so that each gets the same
            statistics; all must call it, and each may have batches of its own, or none. Default: False.

    Returns a row for each layer, with the batches and the elements per channel that it saw; passed over are those whose
    running statistics are not of this kind, as instance normalization's or those of each step of a sequence.

    Raises:
        SurgeryError: the model has no such layer, there are no batches, or a layer is never called.
        OptionError: another estimator, or a limit below 1.

    Reference: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), https://arxiv.org/abs/2105.07576, section 3.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> changes = recalibrate(model, [torch.zeros(98, 1), torch.ones(2, 1)])
    >>> model[0].running_mean, model[0].running_var
    (tensor([0.0200]), tensor([0.0196]))
    """
    check_options("recalibrate", estimator=(estimator, Estimator))
    if limit is not None and limit < 1:
        raise OptionError(f"recalibrate: limit={limit}; wanted batches to take, from 1, or None for all")
    every = model.named_modules()
    kept = {name: module for name, module in every if isinstance(module._buffers.get("running_mean"), Tensor)}
    left = {name: reason for name, module in kept.items() if (reason := _refusal(module))}
    norms = {name: module for name, module in kept.items() if name not in left}
    if not norms:
        others = "; ".join(f"{label(name)}: {reason}" for name, reason in left.items())
        raise SurgeryError(
            "the model has no batch normalization with running statistics" + (f" ({others})" if left else "")
        )
    sums = {name: _Inputs(estimator) for name in norms}
    seen = 0
    with torch.no_grad(), _as_when_training(model, norms.values()), ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(sums[name].see, with_kwargs=True).remove)
        for batch in islice(batches, limit):
            seen += 1
            (forward or forward_batch)(model, batch)
    if across_processes:
        for name, norm in norms.items():
            sums[name].gather(norm.get_buffer("running_mean"))
        seen = max(each.batches for each in sums.values())
    if not seen:
        raise SurgeryError("there are no batches; a generator can be walked only once, give a fresh one")
    missing = [label(name) for name in norms if sums[name].found is None]
    if missing:
        raise SurgeryError(f"no element reached {', '.join(missing)}; no layer was changed")
    kept_by = (norm._buffers.get(key) for norm in norms.values() for key in _KEPT)
    written = [buffer for buffer in kept_by if isinstance(buffer, Tensor)]
    with transaction(model, written=written) as opened:
        rows = [_write(label(name), norm, sums[name]) for name, norm in norms.items()]
        return opened.close(model, rows, [PassedOver(label(name), reason) for name, reason in left.items()])


class _Inputs:
    """What a layer's inputs add up to."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator, self.batches, self.elements = estimator, 0, 0
        self.found: Moments | None = None

    def see(self, norm: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take one call's input in; a forward pre-hook."""
        given = inspect.signature(norm.forward).bind(*args, **kwargs).arguments  # a mask may stand behind a condition
        x: Tensor = args[0] if args else given["input"]
        mask = given.get("mask")
        if given.get("lengths") is not None:
            assert isinstance(norm, RecurrentBatchNorm)
            mask = padding_mask(given["lengths"], x, norm.batch_first, given.get("start", 0))
        if not x.numel():
            return
        last = isinstance(norm, RecurrentBatchNorm) or getattr(norm, "layout", "n c *") == "n * c"
        channels = x.dim() - 1 if last else 1
        # Thousands of batches are summed: in float64, where the device has it.
        x = x.detach() if x.device.type == "mps" else x.detach().double()
        new = moments(x, [d for d in range(x.dim()) if d != channels], mask)
        count = torch.as_tensor(new.n, dtype=x.dtype, device=x.device).expand(new.mean.shape).reshape(-1)
        new = Moments(new.mean.reshape(-1), new.var.reshape(-1), count)
        self.batches += 1
        self.elements += int(count.max())
        if self.estimator == "mean":
            defined = count > 1  # of one element there is no unbiased variance
            new = Moments(new.mean, torch.where(defined, new.unbiased(), 0.0), defined.to(x.dtype))
        self.found = new if self.found is None else self._merged(self.found, new)

    @torch.no_grad()
    def gather(self, like: Tensor) -> None:
        """Take in what the other processes saw; all in the same order, so that all end with the same numbers."""
        wide = torch.float32 if like.device.type == "mps" else torch.float64
        own = torch.zeros(5, like.numel(), dtype=wide, device=like.device)
        if self.found is not None:
            own = torch.stack([*self.found[:2], torch.as_tensor(self.found.n), *own[3:]])
            own[3], own[4] = self.batches, self.elements
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        self.found, self.batches, self.elements = None, 0, 0
        for mean, var, count, batches, elements in every:
            self.batches, self.elements = self.batches + int(batches.max()), self.elements + int(elements.max())
            if count.any():
                new = Moments(mean, var, count)
                self.found = new if self.found is None else self._merged(self.found, new)

    def _merged(self, old: Moments, new: Moments) -> Moments:
        if self.estimator == "population":
            return old.merge(new)
        total = torch.as_tensor(old.n + new.n)
        share = new.n / total.clamp_min(1)
        return Moments(old.mean + share * (new.mean - old.mean), old.var + share * (new.var - old.var), total)


def _refusal(module: nn.Module) -> str:
    if is_frozen(module):
        return "it is frozen; unfreeze it first"
    if isinstance(module, RecurrentBatchNorm) and module.max_length is not None:
        return "it keeps statistics of each step"
    known = isinstance(module, _KINDS)
    return "" if known else "its running statistics are not those of a batch normalization that is known"


@contextmanager
def _as_when_training(model: nn.Module, norms: Iterable[nn.Module]) -> Iterator[None]:
    """Everything in evaluation but the norms, which normalize by their batch's statistics; all is put back afterwards."""
    norms = list({id(norm): norm for norm in norms}.values())
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    schedules = [(norm, norm.schedule) for norm in norms if isinstance(norm, BatchRenorm)]
    try:
        with modes_kept(model):
            model.eval()
            for norm in norms:
                norm.training = True
            for norm, _ in schedules:
                norm.schedule = RenormSchedule.constant(1, 0)
            yield
    finally:
        for norm, schedule in schedules:
            norm.schedule = schedule
        for buffer, value in buffers:
            buffer.copy_(value)


@torch.no_grad()
def _write(name: str, norm: nn.Module, seen: _Inputs) -> Change:
    found = seen.found
    assert found is not None
    scale = "running_std" if isinstance(norm, BatchRenorm) else "running_var"
    var = found.var + norm.eps if isinstance(norm, BatchRenorm) else found.var
    wanted = {"running_mean": found.mean, scale: var.sqrt() if isinstance(norm, BatchRenorm) else var}
    deviation = (found.var + getattr(norm, "eps", 0.0)).sqrt()
    shift = float(((norm.get_buffer("running_mean") - found.mean) / deviation).abs().max())
    if isinstance(norm, MeanOnlyBatchNorm):
        del wanted[scale]
    for key, value in wanted.items():
        norm.get_buffer(key).copy_(value)
    what = f"{type(norm).__name__}({found.mean.numel()})"
    batches = "1 batch" if seen.batches == 1 else f"{seen.batches} batches"
    note = f"of {batches}, {seen.elements} elements per channel; means moved by up to {shift:.2g} deviations"
    return Change(name, what, what, note)


def forward_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a dict by name, of a tuple or list the first item."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)
