"""Bake weight parametrizations in: the effective weight becomes the plain parameter; and a scale and a shift into layers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize, prune

from normkit.core.errors import SurgeryError
from normkit.surgery.changes import Change, label
from normkit.surgery.norms import Norm
from normkit.surgery.select import is_gpt2_linear
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import modes_kept
from normkit.weights.attachment import own_class

_HOOKED = ("torch.nn.utils.parametrizations", "normkit.weights.weight_norm")


def bake(model: nn.Module) -> list[Change]:
    """Replace every parametrized tensor of a model by its present value, in place, and every one that torch's older hooks make.

    The raw parameter keeps its identity where there is one; where there are several, as in weight normalization, a new one
    takes their place. Values are those of evaluation: a spectral norm is not iterated.

    >>> from normkit.weights.weight_norm import weight_norm
    >>> layer = weight_norm(nn.Linear(2, 3))
    >>> print(*bake(layer), [name for name, _ in layer.named_parameters()])
    (model): Linear with WeightNorm -> Linear ['bias', 'weight']
    """
    found = [
        (name, layer, weight)
        for name, layer in model.named_modules()
        if parametrize.is_parametrized(layer)
        for weight in _names(layer)
    ]
    values = {id(_lists(layer)[weight]): value_of(layer, weight) for _, layer, weight in found}
    _refuse_ties(model, [(_full(name, weight), _lists(layer)[weight]) for name, layer, weight in found], values)
    made: dict[tuple[int, ...], nn.Parameter] = {}
    rows = _bake_hooked(model)
    for layer in {id(layer): layer for _, layer, _ in found}.values():
        own_class(layer)  # torch takes the property off the class, which copies of the layer share
        # Weight norm's hook on older checkpoints goes with it; torch's can't even be pickled.
        for key, held in list(layer._load_state_dict_pre_hooks.items()):
            hook = getattr(held, "hook", held)
            if getattr(hook, "func", hook).__module__ in _HOOKED:
                del layer._load_state_dict_pre_hooks[key]
    for name, layer, weight in found:
        plist = _lists(layer)[weight]
        value, originals = values[id(plist)], list(plist.parameters(recurse=False))
        plain = parametrize.type_before_parametrizations(layer).__name__
        stack = " and ".join(type(part).__name__ for part in plist.children())
        single = plist.is_tensor
        parametrize.remove_parametrizations(layer, weight, leave_parametrized=not single)
        if single:
            getattr(layer, weight).data = value
        elif originals:
            # torch would leave a frozen weight as a buffer here, and two tied ones as two.
            key = tuple(map(id, originals))
            trained = any(parameter.requires_grad for parameter in originals)
            parameter = made.setdefault(key, nn.Parameter(value, requires_grad=trained))
            delattr(layer, weight)
            layer.register_parameter(weight, parameter)
        rows.append(Change(_full(name, weight), f"{plain} with {stack}", plain))
    return rows


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """A model whose weights are plain parameters while the block runs: what other libraries save, and read, is whole.

    ``save_pretrained`` of Hugging Face models and whatever else knows weights by their plain names leaves parametrized ones out
    without a word. The values are those of evaluation; afterwards the model is as it was, bit for bit.

    SurgeryError is raised where a tied weight would be untied.

    >>> from normkit import condition
    >>> model = condition(nn.Sequential(nn.Linear(2, 3))).model
    >>> with plain(model):
    ...     list(model.state_dict())
    ['0.bias', '0.weight']
    >>> list(model.state_dict())
    ['0.bias', '0.parametrizations.weight.original']
    """
    with transaction(model) as opened:
        changes = opened.close(model, bake(model))
    try:
        yield model
    finally:
        changes.undo()


def _bake_hooked(model: nn.Module) -> list[Change]:
    """Weights that a hook of ``torch.nn.utils`` makes become parameters; those hooks know how."""
    rows = []
    for name, layer in model.named_modules():
        for key, hook in list(layer._forward_pre_hooks.items()):
            remove = getattr(hook, "remove", None)
            if type(hook).__module__.startswith("torch.nn.utils") and remove is not None:
                weight = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
                training, layer.training = layer.training, False
                if isinstance(hook, prune.BasePruningMethod):
                    hook(layer, ())  # it makes the weight when the layer runs
                remove(layer)
                layer.training = training
                del layer._forward_pre_hooks[key]
                drop = (layer._state_dict_hooks, layer._load_state_dict_pre_hooks)
                for hooks in drop:
                    for other, held in list(hooks.items()):
                        if type(getattr(held, "hook", held)).__module__.startswith("torch.nn.utils"):
                            del hooks[other]
                rows.append(
                    Change(
                        _full(name, weight), f"{type(layer).__name__} with {type(hook).__name__}", type(layer).__name__
                    )
                )
    return rows


def _lists(layer: nn.Module) -> nn.ModuleDict:
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return lists


def _names(layer: nn.Module) -> list[str]:
    return [name for name, _ in _lists(layer).named_children()]


def _full(name: str, weight: str) -> str:
    return label(name) if weight == "weight" else f"{name}.{weight}".lstrip(".")


def value_of(layer: nn.Module, weight: str) -> Tensor:
    """A copy of a layer's tensor as it is used in evaluation, parametrized or not."""
    held = _lists(layer)[weight] if parametrize.is_parametrized(layer, weight) else nn.Identity()
    with torch.no_grad(), modes_kept(held):
        held.eval()
        return getattr(layer, weight).detach().clone()


def _refuse_ties(model: nn.Module, found: list[tuple[str, nn.Module]], values: dict[int, Tensor]) -> None:
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((label(name), module))
    for full, plist in found:
        for parameter in plist.parameters(recurse=False):
            for other, holder in holders[id(parameter)]:
                if holder is plist or (id(holder) in values and torch.equal(values[id(holder)], values[id(plist)])):
                    continue
                other = other.partition(".parametrizations.")[0]
                raise SurgeryError(
                    f"{full}: its raw weight is tied to that of {other}, and baking in would untie them, as the two "
                    "are used with different values; parametrize both alike, or untie them first"
                )


def scale_and_shift(module: nn.Module, norm: Norm) -> tuple[Tensor, Tensor]:
    """What a norm applies last, per channel, in float64: its gain and bias, and its running statistics if it has such."""
    count = norm.shape[0]
    given = [part for part in (norm.weight, norm.bias, module._buffers.get("running_mean")) if part is not None]
    scale = torch.ones(count, dtype=torch.float64, device=given[0].device)
    shift = torch.zeros_like(scale)
    if norm.weight is not None:
        scale = norm.offset + norm.weight.detach().double()
    if norm.tracks:
        var, deviation = (module._buffers.get(name) for name in ("running_var", "running_std"))
        if var is not None:
            deviation = (var.double() + norm.guard(torch.float32)).sqrt()
        scale = scale if deviation is None else scale / deviation.double()
        shift = -module.get_buffer("running_mean").double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def absorb_behind(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Let a Linear, Conv or ConvTranspose, in groups or not, compute scale * layer(x) + shift, with new parameters."""
    kernel, bias = _kernel(layer), layer._parameters.get("bias")
    if isinstance(
        layer, _ConvTransposeNd
    ):  # (in, out / groups, *): groups lie in the first axis, output channels in the second
        apart = kernel.unflatten(0, (layer.groups, -1))
        kernel = (apart * scale.view(layer.groups, 1, -1, *[1] * (kernel.dim() - 2))).flatten(0, 1)
    else:
        kernel = kernel * scale.view(-1, *[1] * (kernel.dim() - 1))
    _set(layer, kernel, shift if bias is None else bias.detach().double() * scale + shift)


def absorb_before(layer: nn.Module, scale: Tensor, shift: Tensor) -> str:
    """Let a Linear or Conv compute layer(scale * x + shift), with new parameters; or give the reason why it can't."""
    kernel, bias, moved = _kernel(layer), layer._parameters.get("bias"), bool(shift.any())
    if isinstance(layer, _ConvTransposeNd):
        return "a transposed convolution behind it can't take it in"
    if isinstance(layer, _ConvNd) and moved and layer.padding_mode == "zeros" and _pads(layer):
        return "the convolution behind it pads with zeros, which the norm's shift would not reach"
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    view = (groups, 1, -1, *[1] * (kernel.dim() - 2))
    apart = kernel.unflatten(0, (groups, -1))
    added = (apart * shift.view(view)).flatten(0, 1).flatten(1).sum(1)
    old = None if bias is None else bias.detach().double()
    _set(layer, (apart * scale.view(view)).flatten(0, 1), old if not moved else added if old is None else old + added)
    return ""


def _pads(layer: _ConvNd) -> bool:
    padding = layer.padding
    return any(size > 1 for size in layer.kernel_size) if padding == "same" else padding != "valid" and any(padding)


def _kernel(layer: nn.Module) -> Tensor:
    """The weight in float64, output units first but for a transposed convolution."""
    kernel = layer.get_parameter("weight").detach().double()
    return kernel.t() if is_gpt2_linear(layer) else kernel


def _set(layer: nn.Module, kernel: Tensor, bias: Tensor | None) -> None:
    old, before = layer.get_parameter("weight"), layer._parameters.get("bias")
    weight = (kernel.t() if is_gpt2_linear(layer) else kernel).to(old.dtype).contiguous()
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=old.requires_grad))
    if bias is not None:
        trained = old.requires_grad if before is None else before.requires_grad
        layer.register_parameter("bias", nn.Parameter(bias.to(old.dtype), requires_grad=trained))


def centred(tensor: Tensor, axis: int) -> Tensor:
    """A tensor less its mean along an axis; a parameter where it was one."""
    wide = tensor.detach().double()
    value = (wide - wide.mean(axis, keepdim=True)).to(tensor.dtype)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
