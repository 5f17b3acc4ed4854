"""Finds out what an unknown norm computes by running it on random inputs."""

import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normkit.activations.gated_rms_norm import GatedRMSNorm
from normkit.engine.layer import Cast
from normkit.engine.reference import ACTIVATIONS

_BIAS_NAMES = ("bias", "beta", "shift", "b")
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)
_SIZES = (1.0, 1e-3, 1e-5)  # the small inputs tell eps apart
# The formulas differ by percents where they differ; classes that compute in float32 agree to about 1e-6.
_TOLERANCE = 1e-5
# bfloat16 has few values: two ways to round differ in a fifth of them, one and the same way in next to none.
_ROUNDED_ALIKE = 0.98
_CASTS: tuple[Cast, ...] = ("after weight", "before weight")
_FAMILIES = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "torch.nn.modules.normalization")
_RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class Found:
    """What an unknown norm was seen to compute."""

    # ``"layer_norm"``, ``"rms_norm"``, ``"batch_norm"`` by statistics that never change, or ``"torch"``: what the
    # class of torch does that it derives from.
    kind: str
    over: str = ""  # the axes of ``"n c *"`` over which it normalizes, or "" for the last axis
    offset: int = 0  # 1 where the gain is 1 + weight, else 0
    eps: float = 0.0  # inside the root
    weight: str = ""  # the name of its gain, or ""
    bias: str = ""  # the name of its bias, or ""
    # How many features it has, before them heads where each has a gain of its own; empty if it takes any number.
    shape: tuple[int, ...] = ()
    cast: Cast | None = "after weight"  # when a half type is rounded; None where it is otherwise, or that can't be seen
    # What follows, by its name where normkit's layers know it, else as a module; None where nothing does.
    activation: str | nn.Module | None = None


def probe(module: nn.Module) -> Found | str:
    """Compare a module with the formulas of layer and RMS normalization, of frozen batch normalization, and with torch's class.

    Each may be followed by an activation. The module is not changed and its hooks don't run: a stand-in of the same class with
    random parameters in float64 is run in its place, and one in bfloat16 for the order in which it rounds.
    """
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(arguments) != 1:
        return f"its forward takes {', '.join(arguments) or 'nothing'}; a norm takes its input alone"
    if any(True for child in module.children() for _ in (*child.parameters(), *child.buffers())):
        return f"it has layers with parameters in it ({', '.join(name for name, _ in module.named_children())})"
    own = {name: p for name, p in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    base = next((kind for kind in type(module).__mro__ if kind.__module__ in _FAMILIES), None)
    if base is not None and base is not type(module) and (found := _as_torch(module, base, own)):
        return found
    if set(_RUNNING) <= set(own):
        what = "batch normalization by its running statistics" if base is None else base.__name__
        return _frozen(module, own) or f"it is not {what}, with or without an activation that is known"
    return _by_formula(module, {name: p for name, p in own.items() if isinstance(p, nn.Parameter)}, own)


def _as_torch(module: nn.Module, base: type[nn.Module], own: dict[str, Tensor]) -> Found | None:
    """Whether it does what the class of torch does that it derives from, in training and evaluation, and an activation."""
    channels = next((p.numel() for p in own.values() if p.dim() == 1), getattr(module, "num_features", 8))
    for sizes, _ in _inputs(channels):
        x = _random(torch.Generator().manual_seed(1), *sizes) + 0.5
        given = {name: _like(name, p) for name, p in own.items()}
        fits, checked = _activations(module), 0
        for training in (False, True):
            both = [_stand_in(module, {k: v.clone() for k, v in given.items()}, training) for _ in range(2)]
            y, z = _run(both[0], x), _run(both[1], x, forward=base.forward)
            if y is None or z is None or y.shape != z.shape:
                break
            kept = zip(both[0]._buffers.values(), both[1]._buffers.values(), strict=True)
            if any(a is not None and b is not None and not torch.equal(a, b) for a, b in kept):
                return None
            fits = [(act, f) for act, f in fits if _close(y, f(z))]
            checked += 1
        if checked == 2 and fits:
            return Found("torch", activation=fits[0][0])
    return None


def _frozen(module: nn.Module, own: dict[str, Tensor]) -> Found | None:
    """Whether it is batch normalization by its running statistics in training too."""
    mean = own["running_mean"]
    given = {name: _like(name, p) for name, p in own.items()}
    weight, bias = (given.get(name) for name in ("weight", "bias"))
    x = _random(torch.Generator().manual_seed(1), 2, mean.numel(), 3, 4)
    doubles = (_stand_in(module, {k: v.clone() for k, v in given.items()}, mode) for mode in (False, True))
    seen = [_run(double, x) for double in doubles]
    for eps, (act, f) in itertools.product(_every_eps(module), _activations(module)):
        view = (1, -1, 1, 1)
        z = (x - given["running_mean"].view(view)) * torch.rsqrt(given["running_var"].view(view) + eps)
        z = z if weight is None else z * weight.view(view)
        z = f(z if bias is None else z + bias.view(view))
        if all(y is not None and y.shape == z.shape and _close(y, z) for y in seen):
            names = ("" if part is None else name for name, part in (("weight", weight), ("bias", bias)))
            return Found("batch_norm", "", 0, eps, *names, shape=(mean.numel(),), activation=act)
    return None


def probe_gated(module: nn.Module) -> GatedRMSNorm | None:
    """Compare a module that takes an input and a gate with gated RMS normalization, as ``probe`` does."""
    taken = list(inspect.signature(type(module).forward).parameters.values())[1:]
    own = dict((*module.named_parameters(), *module.named_buffers()))
    if [len(taken), *(p.dim() for p in own.values())] != [2, 1] or taken[1].name != "gate":
        return None
    ((name, weight),) = own.items()
    generator, size = torch.Generator().manual_seed(0), weight.numel()
    gain, x, gate = _random(generator, size), _random(generator, 2, 3, size), _random(generator, 2, 3, size)
    inputs = [(x * scale, gate) for scale in _SIZES] + [(x,)] * (taken[1].default is None)
    seen = [(given, _run(_stand_in(module, {name: gain}, False), *given)) for given in inputs]
    half = x.bfloat16(), gate.bfloat16()
    rounded = _run(_stand_in(module, {name: gain.bfloat16()}, False), *half)
    groups = [count for count in range(1, size + 1) if size % count == 0]
    for early, count, eps in itertools.product((True, False), groups, _every_eps(module)):
        made = GatedRMSNorm(size, eps, norm_before_gate=early, groups=count, device="meta")
        made.weight = nn.Parameter(gain, requires_grad=False)
        if all(y is not None and y.shape == x.shape and _close(y, made(*given)) for given, y in seen):
            made.weight = nn.Parameter(gain.bfloat16(), requires_grad=False)
            for cast in _CASTS:
                made.cast = cast
                if rounded is not None and (made(*half) == rounded).float().mean() >= _ROUNDED_ALIKE:
                    break
            else:
                if weight.dtype not in (torch.float32, torch.float64):
                    return None
            made.register_parameter("weight", module._parameters[name])
            return made
    return None


def _by_formula(module: nn.Module, own: dict[str, Tensor], everything: dict[str, Tensor]) -> Found | str:
    bias = next((name for name in own if name in _BIAS_NAMES), "") if len(own) == 2 else ""
    weight = next((name for name in own if name != bias), "")
    said = getattr(module, "normalized_shape", ())  # by a module without parameters, if it says so
    shapes = {tuple(p.shape) for p in own.values()} or {(said,) if isinstance(said, int) else tuple(said)}
    other = len(own) > 1 + bool(bias) or len(shapes) > 1
    other = other or any(len(shape) > 2 or (own and not shape) for shape in shapes)
    if other or (not own and everything):
        return f"its parameters ({', '.join(own) or 'none'}) are not a weight and at most one bias, of one axis or two"
    (shape,) = shapes
    generator = torch.Generator().manual_seed(0)
    given = {name: _random(generator, *p.shape) for name, p in own.items()}
    double = _stand_in(module, given, False)
    for sizes, axis in [((2, 3, *shape), -1)] if len(shape) > 1 else _inputs(shape[0] if shape else 8):
        x = _random(generator, *sizes) + 0.5
        seen = [(x * size, _run(double, x * size)) for size in _SIZES]
        if any(y is None or y.shape != x.shape for _, y in seen):
            continue
        overs = [""] if axis == -1 else ["c", "c *"]
        tried = itertools.product(("layer_norm", "rms_norm"), overs, (0, 1) if own else (0,), _every_eps(module))
        for kind, over, offset, eps in tried:
            found = Found(kind, over, offset, eps, weight, bias, shape)
            for act, f in _activations(module):
                if all(y is not None and _close(y, f(_formula(found, z, given, axis))) for z, y in seen):
                    return replace(found, cast=_cast(module, found, given, x, axis, f), activation=act)
    return "it fits neither layer normalization nor RMS normalization with gain weight or 1 + weight"


def _formula(found: Found, x: Tensor, given: dict[str, Tensor], axis: int, cast: Cast = "after weight") -> Tensor:
    """What was found, in float64; or in bfloat16 with statistics in float32, rounded as ``cast`` says."""
    dims, wide = (
        tuple(range(1, x.dim())) if found.over == "c *" else (axis,),
        x if x.dtype == torch.float64 else x.float(),
    )
    centred = wide - wide.mean(dims, keepdim=True) if found.kind == "layer_norm" else wide
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + found.eps)
    if cast == "before weight":
        y = y.to(x.dtype)
    view = [-1 if d == axis % x.dim() else 1 for d in range(x.dim())]
    gain, shift = (
        None if p is None else p.to(y.dtype) if p.dim() > 1 else p.to(y.dtype).view(view)
        for p in (given.get(found.weight), given.get(found.bias))
    )
    y = y if gain is None else y * (found.offset + gain)
    return (y if shift is None else y + shift).to(x.dtype)


def _cast(
    module: nn.Module, found: Found, given: dict[str, Tensor], x: Tensor, axis: int, act: Callable[[Tensor], Tensor]
) -> Cast | None:
    """When a half type is rounded: the way that gives the very numbers of the module in bfloat16."""
    half = {name: value.bfloat16() for name, value in given.items()}
    x = x.bfloat16()
    y = _run(_stand_in(module, half, False), x)
    if y is None or y.dtype != x.dtype:
        return None
    shares = {way: (y == act(_formula(found, x, half, axis, way))).float().mean().item() for way in _CASTS}
    best = max(_CASTS, key=lambda way: shares[way])
    return best if shares[best] >= _ROUNDED_ALIKE else None


def _activations(module: nn.Module) -> list[tuple[str | nn.Module | None, Callable[[Tensor], Tensor]]]:
    """What may follow: nothing, an activation that layers here know, or the module's children in their order."""
    found: list[tuple[str | nn.Module | None, Callable[[Tensor], Tensor]]] = [(None, lambda y: y), *ACTIVATIONS.items()]
    parts = [child for child in module.children() if not isinstance(child, nn.Identity)]
    if parts:
        whole = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
        quiet = copy.deepcopy(whole).eval()
        # In place it would change what it is compared with.
        found.append((whole, lambda y: quiet(y.clone())))
        if any("Dropout" in type(part).__name__ and getattr(part, "p", 1) for part in parts):
            return found[-1:]  # in evaluation it is not seen
    return found


def _every_eps(module: nn.Module) -> list[float]:
    own = [value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 1]
    return list(dict.fromkeys([*own, *_USUAL_EPS]))


def _inputs(channels: int) -> list[tuple[tuple[int, ...], int]]:
    """Shapes to try, each with its channel axis; positions are never as many as channels."""
    a, b = (3 if channels != 3 else 5), (4 if channels != 4 else 6)
    first = (2, channels, a, b), (2, channels, a), (2, channels, a, b, 2)
    return [((2, a, channels), -1), ((2, a, b, channels), -1), *((shape, 1) for shape in first)]


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _like(name: str, tensor: Tensor) -> Tensor:
    """A random value for a parameter or buffer; of a variance positive, and small enough that eps shows."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    value = _random(torch.Generator().manual_seed(len(name)), *tensor.shape)
    return (value * 1e-2).square() if name == "running_var" else value


def _stand_in(module: nn.Module, given: dict[str, Tensor], training: bool) -> nn.Module:
    double = object.__new__(type(module))
    own = vars(double)
    own |= {**vars(module), "training": training, "_compiled_call_impl": None}
    own |= {name: OrderedDict() for name in vars(module) if name.endswith("_hooks")}
    held = {name: None if old is None else given[name] for name, old in module._parameters.items()}
    own["_parameters"] = {k: None if v is None else nn.Parameter(v, requires_grad=False) for k, v in held.items()}
    own["_buffers"] = {name: given.get(name) for name in module._buffers}
    children = module._modules.items()
    own["_modules"] = {name: None if child is None else _stand_in(child, {}, False) for name, child in children}
    return double


def _run(double: nn.Module, *given: Tensor, forward: Callable[..., Tensor] | None = None) -> Tensor | None:
    given = tuple(x.clone() for x in given)
    try:
        with torch.no_grad():
            y = double(*given) if forward is None else forward(double, *given)
    except Exception:  # a shape that the class does not take: any error may say so
        return None
    return y if isinstance(y, Tensor) else None


def _close(y: Tensor, wanted: Tensor) -> bool:
    return bool((y.double() - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
