"""Which back end runs a call, and why: one pure function of the call's key, which ``explain`` prints and ``run`` obeys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from normkit.core.errors import BackendError, OptionError, ShapeError
from normkit.core.moments import accumulation_dtype
from normkit.core.support import Split, per_shape, place, show
from normkit.engine import aten, bare, closed_form, native, nested, operator, reference
from normkit.engine.call import Call, Output
from normkit.engine.eager import traced, watched
from normkit.engine.library import why_not
from normkit.engine.prepared import Prepared, prepare

_WHAT = {
    "reference": "the definition in plain PyTorch",
    "closed": "PyTorch operators with the backward pass in closed form",
    "aten": "torch's own fused kernel",
    "native": "normkit's fused CPU kernel",
    "nested": "each of the tensors inside it",
}
_LOOPS = {
    "row": "the reduced axes are contiguous in memory",
    "column": "the kept axes are contiguous in memory",
    "block": "the reduced axes lie on both sides of a kept one in memory",
}
_NAMED = ("reference", "closed", "aten", "native")


class Choice(NamedTuple):
    """A back end for a call, the reason for it, how the input is split, and what runs it."""

    backend: str
    why: str
    split: Split
    perform: Callable[[Call], Output]


@dataclass(frozen=True)
class Explanation:
    """Which back end runs a rule on an input, why, and what shares a statistic. Prints as text."""

    backend: str
    why: str
    formula: str
    support: str
    accumulation: torch.dtype
    kept: str = ""  # of a layer with save="output": whether it does keep its output, or why not

    def __str__(self) -> str:
        return (
            f"{self.formula}\n{self.support}\n"
            f"statistics in {str(self.accumulation).removeprefix('torch.')}; back end: {self.backend}, {_WHAT[self.backend]}\n"
            f"because {self.why}" + (f"\nkeeps {self.kept} for the backward pass" if self.kept else "")
        )


def backends() -> dict[str, str | None]:
    """All back ends, each with the reason it can't run here, or None if it can."""
    return {**dict.fromkeys(_NAMED), "native": why_not()}


# The winner under "auto", by where the call runs. No row depends on the number of rows, samples or elements: else a sample's last
# digits would depend on the size of its batch.
#
#   eager, CPU            native: right in every dtype, layout and order of derivatives; torch's kernels are not (aten.py)
#   eager, elsewhere      aten where torch has a kernel that is right, else closed: one tensor kept where autograd keeps five
#   eager, no library     likewise
#   compiler, jit.trace   aten, else the definition: the compiler fuses either with its neighbours, and not our kernels
#   torch.func, forward   the definition: it alone has every derivative there
#   a mask, other rules   the definition
def choose(call: Call) -> Choice:
    """The back end for a call."""
    x = call.x
    if nested.applies(call):  # first, as a nested tensor has no shape to split
        return Choice(
            "nested",
            "each tensor inside it is normalized separately",
            nested.split(call),
            partial(nested.perform, each=_each),
        )
    split = _checked(call)
    # All four are asked, as the reason for one names what the others lack. Asking computes nothing.
    found: dict[str, Callable[[Call], Output] | str] = {
        "native": _native(call, split),
        "aten": aten.refusal(call, split) or partial(aten.perform, split=split),
        "closed": closed_form.refusal(call, split) or partial(closed_form.perform, split=split),
        "reference": partial(reference.perform, split=split),
    }
    if call.backend != "auto":
        perform = found[call.backend]
        if isinstance(perform, str):
            raise BackendError(
                f'backend="{call.backend}" can\'t run {call.rule.support} on a {show(x.shape)} input: {perform}; '
                'use backend="auto"'
            )
        return Choice(call.backend, "it was asked for by name", split, perform)
    candidates = ["native", "aten", "closed", "reference"]
    if watched():
        candidates.remove("native")  # a kernel would hide the operators from what watches them
    if traced():
        candidates.remove("closed")  # a custom autograd.Function is opaque to them
    for name in candidates:
        perform = found[name]
        if not isinstance(perform, str):
            return Choice(name, _reason(name, found), split, perform)
    raise AssertionError("the definition runs everything")


def kept(call: Call, key: tuple[Any, ...] | None) -> Choice:
    """The choice for a call, cached in its rule under this key; None caches nothing."""
    # In the rule rather than in a global cache: layers with equal settings share it, and it is freed with the rule.
    return choose(call) if key is None else call.rule.keep(key, partial(choose, call))


def _each(call: Call) -> Output:
    return kept(call, call.key()).perform(call)


def _native(call: Call, split: Split) -> Callable[[Call], Output] | str:
    if call.mask is not None:
        return "the kernels take no mask"
    if not watched():
        # Preparing is the test: whatever it refuses has no kernel, and whatever it returns is what runs.
        output = call.save == "output" and call.own
        parameters = call.weight, call.bias
        ready = prepare(call.rule, call.x, split, *parameters, call.activation, call.running, not call.own, output)
        if isinstance(ready, str):
            simpler = bare.prepare_bare(call, split)
            return partial(bare.perform, simpler) if isinstance(simpler, Prepared) else ready
        return partial(native.perform if call.own else native.perform_by, ready)
    # In a compiled graph alone the kernels are operators; statistics that are given or returned stay with the definition there.
    if not torch.compiler.is_compiling() or not call.own or call.wants_moments or closed_form.refusal(call, split):
        return "the native kernels do not run under this transform of torch"
    return operator.refusal(call) or operator.perform


def _reason(name: str, found: dict[str, Callable[[Call], Output] | str]) -> str:
    if name == "native":
        perform = found[name]
        assert isinstance(perform, partial)
        after = "; torch's operators apply the weight and the bias" if perform.func is bare.perform else ""
        return _LOOPS[perform.args[0].nest.kind] + after
    if name == "aten":
        return "torch has a fused kernel for these axes and this statistic"
    if name == "closed":
        return f"{found['native']}, and {found['aten']}"
    if torch.compiler.is_compiling():
        return "the compiler fuses the definition with its neighbours"
    if traced():
        return "torch.func and forward mode cannot see through a custom autograd.Function"
    return str(found["closed"])


def _checked(call: Call) -> Split:
    """Check parameters, residual, running statistics and names against the input, and return its split."""
    rule, x = call.rule, call.x
    split = rule.support.split(x.shape)
    accumulation_dtype(x.dtype)  # refuses integers before anything is computed
    if call.backend not in ("auto", *_NAMED):
        raise OptionError(f"backend={call.backend!r}: wanted one of auto, {', '.join(_NAMED)}")
    reference.check_activation(call.activation)
    for parameter in (call.weight, call.bias):
        if parameter is None:
            continue
        if rule.compensation is None:
            raise ShapeError("a weight or bias is given, but the rule has no compensation; add one, e.g. Affine('c')")
        if parameter.shape != per_shape(rule.compensation.per, split):
            place(parameter, rule.compensation.per, split)  # raises; a back end might broadcast it or read past its end
    residual = call.residual
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ShapeError(
            f"residual is {residual.dtype} of {show(residual.shape)}, wanted {x.dtype} of {show(x.shape)} as the input is"
        )
    if call.running is not None:
        if rule.memory is None:
            raise ShapeError("running statistics are given, but the rule has no memory; add one, e.g. Running()")
        scaled = rule.statistic.scale is not None
        wanted = per_shape(rule.memory.per, split)
        for name, value in (("running_mean", call.running.mean), ("running_var", call.running.var))[: 1 + scaled]:
            if tuple(value.shape) != wanted:
                raise ShapeError(
                    f"{name} has shape {show(value.shape)}, wanted {show(wanted)} for an input of {show(x.shape)}; "
                    "pass the statistics of this number of channels"
                )
    return split
