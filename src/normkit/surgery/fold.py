"""Fold: bake normalizations into the weights for inference, and prove on an example that nothing changed."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.catalogue.methods import METHODS
from normkit.core.errors import OptionError, SurgeryError
from normkit.surgery.attach import tied_parameters
from normkit.surgery.bake import absorb_before, absorb_behind, bake, centred, scale_and_shift
from normkit.surgery.changes import Change, Changes, Refusals, label
from normkit.surgery.freeze import is_frozen
from normkit.surgery.norms import Norm, describe, is_norm, norms_in, read_norm
from normkit.surgery.select import is_gpt2_linear
from normkit.surgery.substitute import inherit, put
from normkit.surgery.target import Target, activation_module, norm_cards
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import Axis, Sight, Stream, Watch, run_on, tensors_in

# In evaluation one scale and shift for each channel, as their cards claim and the tests hold them to.
_FOLDABLE = frozenset(card.module for card in METHODS if card.kind == "activation" and card.foldable)
_BATCH = ("batch_norm", "sync_batch_norm", "frozen_batch_norm")
_GAINS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")
# About a thousand roundings, by which a folded network may differ where later layers amplify the first one's rounding.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class _Refused(Exception):
    """Why a fold is not done."""


def fold(model: nn.Module, example: Any = None, *, centring: bool = False, tolerance: float | None = None) -> Changes:
    """Bake normalizations into the weights of a model, in place, for inference.

    Every weight parametrization becomes its value, and so does a weight that a hook of ``torch.nn.utils`` makes. With an example,
    on which the model is run to see what reads what, also

    * a convolution of a class of its own that computes with another weight than it holds, as weight-standardizing ones do,
      becomes torch's with that weight;
    * each batch normalization, torch's, frozen, with an activation behind it or of its family here, goes into the Conv,
      ConvTranspose or Linear before it, W' = (weight / s) W, b' = bias + (b - mean) weight / s, s = sqrt(var + eps) (or what the
      norm keeps), or into those behind it, if they don't pad with zeros; its activation and dropout, or an Identity, stay there;
    * gain and bias of a layer, RMS, group or instance normalization go into the Linear or Conv layers behind it, and one
      without parameters is left: torch's, or one from here over channels on axis 1, which torch lacks, or with its dropout
      or ``save="output"``; a bias that dropout follows stays, and so does its norm;
    * with ``centring``, a layer normalization over the last axis becomes an RMS normalization (torch's, or one from here where a
      bias is left) if all that its input, such as a residual stream, is summed up from is linear layers, convolutions,
      embeddings and parameters, and nothing but such norms reads it: their weights and biases lose their mean over outputs,
      W' = W - mean(W), b' = b - mean(b), so that the stream has none. With another writer or reader it is left.

    A layer takes a norm in if what it reads or gives is read by nothing else, and its weight is not tied. After each fold the
    model's output is compared with the first one; beyond the tolerance the fold is undone. A branch that the example does not
    take is not seen: give one that takes it.

    Args:
        model: any module; with an example, in evaluation mode.
        example: an input: a tensor, a tuple of arguments, or a dict of them. Default: None, weights only.
        centring: whether layer normalizations become RMS normalizations so. Default: False.
        tolerance: largest difference of outputs that counts as none, relative to their largest value. Default: by the dtype of
            the output, 1e-4 in float32, 1e-10 in float64.

    Raises:
        SurgeryError: a tied weight would be untied; the model is not in evaluation mode, or does not give the same finite output
            twice. The model is left as it was.
        OptionError: ``centring`` without an example.

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference" (2018), https://arxiv.org/abs/1712.05877, section 3.2; gains and centring: Ashkboos et al., "SliceGPT"
    (2024), https://arxiv.org/abs/2401.15024, section 3.2.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double().eval()
    >>> changes = fold(model, torch.ones(1, 3, 5, 5).double())
    >>> changes.rows[0].before, changes.rows[0].after, model[1]
    ('BatchNorm2d(8)', 'Identity()', Identity())
    """
    if centring and example is None:
        raise OptionError("fold: centring=True follows the streams of a run; give example=, an input of the model")
    with transaction(model) as opened:
        if example is None:
            refusals = Refusals("fold", "leave")
            for name, module in norms_in(model).items():
                if any(isinstance(getattr(module, part, None), Tensor) for part in ("weight", "running_mean")):
                    refusals.leave(name, "a norm is folded only with an example=")
            return opened.close(model, bake(model), refusals)
        for name, module in model.named_modules():
            if module.training:
                raise SurgeryError(
                    f"fold: {label(name)} is in training mode, without fixed factors; call model.eval() first"
                )
        trial, refusals = _Trial(model, example, tolerance), Refusals("fold", "leave")
        rows = bake(model)
        if rows:
            error = trial.error()[0]
            rows = [replace(row, note="all weights together", error=error) for row in rows]
        for fold_next in (_fold_kernels, _fold_norms, *[_fold_centring] * centring):
            rows += fold_next(trial, refusals)
        return opened.close(trial.model, rows, refusals)


class _Trial:
    """A model with what it gave on the example at first, to which every fold is held."""

    def __init__(self, model: nn.Module, example: Any, tolerance: float | None) -> None:
        self.model, self.example, self._tolerance = model, example, tolerance
        self._first = _outputs(model, example)
        varies, allowed = _difference(self._first, _outputs(model, example))
        if varies > allowed or not all(bool(torch.isfinite(part).all()) for part in self._first):
            raise SurgeryError(
                "fold: the model does not give the same finite output twice on the example, so no fold is proved"
            )

    def error(self) -> tuple[float, float]:
        """How far the output is from the first, and how far it may be."""
        error, allowed = _difference(self._first, _outputs(self.model, self.example))
        return error, allowed if self._tolerance is None else self._tolerance

    def show(self, sight: Sight) -> None:
        """Let a sight see a run on the example."""
        sight.run(lambda: run_on(self.model, self.example))

    def do(self, what: str, change: Callable[[], dict[int, nn.Module]]) -> float:
        """Make a change that gives new modules by the ids of old ones; its error. Undone and refused beyond the tolerance."""
        old = self.model
        try:
            with transaction(old):
                self.model = put(old, change())
                error, allowed = self.error()
                if error > allowed:
                    raise _Refused(f"{what} changes the output by {error:.1e}")
                return error
        except SurgeryError as error:  # a model may ask its norm's weight for its dtype
            self.model = old
            raise _Refused(f"{what}: {error}") from error
        except BaseException:
            self.model = old
            raise


def _fold_kernels(trial: _Trial, refusals: Refusals) -> list[Change]:
    """Convolutions that compute with another weight than they hold become torch's."""
    own = {
        name: module
        for name, module in trial.model.named_modules()
        if isinstance(module, _ConvNd) and not type(module).forward.__module__.startswith("torch.")
    }
    watch, rows = Watch(own.values(), []), []
    if own:
        trial.show(watch)
    for name, layer in own.items():
        seen = watch.kernel(layer)
        if seen is None or seen[1].shape != layer.weight.shape:
            refusals.leave(name, "it does not convolve once with a weight of its own shape on the example")
            continue
        if _pads_itself(layer, seen[0], watch.shapes.get(id(layer), seen[0].shape)):
            refusals.leave(name, "it pads its input itself, as SAME padding does, by as much as each size asks for")
            continue
        try:
            plain = _plain_convolution(layer, *seen[1:])
            error = trial.do("torch's convolution with its weight", lambda: {id(layer): inherit(plain, layer)})  # noqa: B023
            rows.append(Change(label(name), type(layer).__name__, type(plain).__name__, "weight as computed", error))
        except _Refused as reason:
            refusals.leave(name, str(reason))
    return rows


def _pads_itself(layer: _ConvNd, convolved: Tensor, given: torch.Size) -> bool:
    """Whether a layer convolves more positions than it is given, where torch's own padding does not add them before."""
    torch_adds = layer.padding_mode != "zeros" or layer.padding == "same"
    spatial = len(layer.kernel_size)
    return not torch_adds and convolved.shape[-spatial:] != given[-spatial:]


def _plain_convolution(layer: _ConvNd, weight: Tensor, bias: Tensor | None) -> nn.Module:
    kind = next(kind for kind in type(layer).__mro__ if kind.__module__ == "torch.nn.modules.conv")
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
    like: dict[str, Any] = {"device": "meta", "bias": bias is not None, "padding_mode": layer.padding_mode}
    if layer.transposed:
        like["output_padding"] = layer.output_padding
    made = kind(*sizes, dilation=layer.dilation, groups=layer.groups, **like)
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=layer.weight.requires_grad)
    return made


def _fold_norms(trial: _Trial, refusals: Refusals) -> list[Change]:
    norms = norms_in(trial.model)
    every = trial.model.modules()
    layers = [module for module in every if isinstance(module, nn.Linear | _ConvNd) or is_gpt2_linear(module)]
    watch, ties, rows = Watch(layers, norms.values()), tied_parameters(trial.model), []
    trial.show(watch)
    names = {id(module): name for name, module in trial.model.named_modules()}
    for name, module in norms.items():
        try:
            norm = read_norm(name, module)
        except SurgeryError as error:
            refusals.leave(name, str(error))
            continue
        batch = norm.kind in _BATCH or type(module) in _FOLDABLE
        if not batch and (
            norm.kind not in _GAINS or norm.axes == "trailing" or norm.weight is norm.bias is None or norm.tracks
        ):
            continue
        reasons = []
        for before in (True, False) if batch else (False,):
            try:
                into, after, error = _fold_into(trial, watch, ties, module, norm, before)
                where = ", ".join(label(names[id(layer)]) for layer in into)
                rows.append(Change(label(name), describe(module), describe(after), f"folded into {where}", error))
                break
            except _Refused as reason:
                reasons.append(str(reason))
        else:
            refusals.leave(name, "; ".join(dict.fromkeys(reasons)))
    return rows


def _fold_into(
    trial: _Trial, watch: Watch, ties: dict[int, list[str]], module: nn.Module, norm: Norm, before: bool
) -> tuple[list[nn.Module], nn.Module, float]:
    """Fold a norm into the layer before it or those behind it: these, what is left of it, and the error."""
    found = watch.layer_before(module) if before else watch.layers_behind(module)
    if isinstance(found, str):
        raise _Refused(found)
    layers, rank = ([found[0]] if isinstance(found[0], nn.Module) else found[0]), found[1]
    _check(module, norm, layers, ties)
    if norm.activation is not None and not before:
        raise _Refused("an activation stands between it and the layer behind it")
    for layer in layers:
        if isinstance(layer, _ConvNd):
            fits = norm.axes == "n c *" and rank == len(layer.kernel_size) + 2
        else:
            fits = norm.axes == "n * c" or rank == 2
        if not fits:
            side, where = ("output", "before") if before else ("input", "behind")
            raise _Refused(f"its channels are not the {side} channels of the layer {where} it")
    after = (activation_module(norm) if before else _without_parameters(norm)).eval()

    def change() -> dict[int, nn.Module]:
        for layer in layers:
            scale, shift = scale_and_shift(module, norm)
            if norm.dropout and not before and bool(shift.any()):
                raise _Refused("a layer behind it would not drop its bias; set its dropout to 0 first if it is trained")
            reason = (absorb_behind if before else absorb_before)(layer, scale, shift)
            if reason:
                raise _Refused(reason)
        return {id(module): after}

    return layers, after, trial.do(f"folding it into what is {'before' if before else 'behind'} it", change)


def _fold_centring(trial: _Trial, refusals: Refusals) -> list[Change]:
    """Layer normalizations that can read what has no mean become RMS normalizations."""
    norms, rows, done = dict[str, tuple[nn.Module, Norm]](), list[Change](), set[str]()
    for name, module in trial.model.named_modules():
        with suppress(SurgeryError):  # passed over already
            norm = read_norm(name, module) if is_norm(module) else None
            if norm is not None and norm.kind == "layer_norm" and norm.axes == "n * c":
                norms[name] = module, norm
    ties = tied_parameters(trial.model)
    held: dict[int, tuple[nn.Module, dict[str, Any], str, str]] = {
        id(tensor): (module, kind, key, label(name if key in ("weight", "bias") else f"{name}.{key}".lstrip(".")))
        for name, module in trial.model.named_modules()
        for kind in (module._parameters, module._buffers)
        for key, tensor in kind.items()
        if tensor is not None
    }
    stream = Stream({name: module for name, (module, _) in norms.items()}, held)
    trial.show(stream)
    for name, (module, _) in norms.items():
        if name in done:
            continue
        try:
            found = stream.of(module)
            if isinstance(found, str):
                raise _Refused(found)
            leaves, heard = found
            for one in heard:
                _check(*norms[one], [held[id(tensor)][0] for tensor, _ in leaves], ties)
            made = {one: _without_mean(norms[one][1]) for one in heard}

            def change(leaves: list[Axis] = leaves, made: dict[str, nn.Module] = made) -> dict[int, nn.Module]:
                for tensor, axis in leaves:
                    _, kind, key, _ = held[id(tensor)]
                    kind[key] = centred(tensor, axis)
                return {id(norms[one][0]): after for one, after in made.items()}

            error = trial.do("centring what writes its stream", change)
            done |= made.keys()
            note = "centring folded into " + ", ".join(dict.fromkeys(held[id(tensor)][-1] for tensor, _ in leaves))
            for one, after in made.items():
                rows.append(Change(label(one), describe(norms[one][0]), describe(after), note, error))
        except _Refused as reason:
            refusals.leave(name, str(reason))
    return rows


def _without_mean(norm: Norm) -> nn.Module:
    weight, bias = norm.weight, norm.bias
    if weight is not None and norm.offset:
        weight = nn.Parameter(weight.detach() + norm.offset, weight.requires_grad)
    kept = {"bias": bias is not None, "dropout": norm.dropout, "save": norm.save}  # torch's takes none of these
    kind = partial(RMSNorm, **kept) if bias is not None or _does_more(norm) else nn.RMSNorm
    made = kind([*norm.shape], norm.eps, weight is not None)
    made._parameters.update(weight=weight, **({} if bias is None else {"bias": bias}))
    return made.eval()


def _does_more(norm: Norm) -> bool:
    """Whether torch's layer lacks what it does."""
    return norm.dropout > 0 or norm.save == "output"


def _without_parameters(norm: Norm) -> nn.Module:
    over, eps = norm.option if norm.axes == "n c *" else "", norm.eps or 0.0
    if norm.kind not in _GAINS:
        return activation_module(norm)
    if _does_more(norm):
        bare = replace(norm, weight=None, bias=None, offset=0.0, affine=False)
        like = norm.weight if norm.weight is not None else norm.bias
        assert like is not None
        return Target(norm_cards()[norm.kind].word, norm.kind, norm.option).build("", bare, like)[0]
    if norm.kind == "rms_norm":  # torch has none over channels on axis 1; and None is its own eps
        return RMSNorm(norm.shape, norm.eps, False, over=over) if over else nn.RMSNorm([*norm.shape], norm.eps, False)
    if norm.kind == "layer_norm" and over != "c *":
        return LayerNorm(norm.shape, eps, False, over=over) if over else nn.LayerNorm([*norm.shape], eps, False)
    groups = {"group_norm": norm.option, "instance_norm": norm.shape[0]}.get(norm.kind, 1)
    return nn.GroupNorm(int(groups), norm.shape[0], eps, affine=False)


def _check(module: nn.Module, norm: Norm, layers: list[nn.Module], ties: dict[int, list[str]]) -> None:
    if (norm.kind in _BATCH or type(module) in _FOLDABLE) and not norm.tracks:
        raise _Refused("it keeps no running statistics, and so depends on the batch")
    held = [
        hook
        for part in (*layers, module)
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    ]
    if len(held) > is_frozen(module):  # of a frozen one there is a hook that only says so
        raise _Refused("it or a layer next to it has hooks")
    if any(id(parameter) in ties for layer in layers for parameter in layer.parameters(recurse=False)):
        raise _Refused("the weight of a layer next to it is tied to another")


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    try:
        with torch.no_grad():
            # Copies: an output may be a buffer of the model that the next run writes into.
            return [part.detach().clone() for part in tensors_in(run_on(model, example))]
    except Exception as error:
        raise SurgeryError(f"fold: the model does not run on the example: {type(error).__name__}: {error}") from error


def _difference(first: list[Tensor], now: list[Tensor]) -> tuple[float, float]:
    """The largest difference relative to the largest value of the output it is in, and what rounding explains."""
    if [part.shape for part in first] != [part.shape for part in now]:
        return float("inf"), 0.0
    errors, allowed = [0.0], [0.0]
    for a, b in zip(first, now, strict=True):
        if not a.is_floating_point():
            errors.append(0.0 if torch.equal(a, b) else float("inf"))
        elif a.numel():
            size = float(a.double().abs().max())
            error = float((a.double() - b.double()).abs().max()) / (size or 1.0)
            errors.append(error if error == error else float("inf"))
            allowed.append(_TOLERANCE.get(a.dtype, 1e-1))
    return max(errors), max(allowed)
