"""Weight decay of a norm's gain and bias: towards 1 and 0 rather than both towards 0, or not at all."""

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.activations.conditional_norm import ConditionalNorm
from normkit.activations.divisive_norm import HeegerNorm, LyuSimoncelliNorm
from normkit.activations.gdn import GDN
from normkit.activations.global_response_norm import GlobalResponseNorm
from normkit.activations.hypersphere import LearnedScale
from normkit.activations.recurrent_layer_norm import LayerNormGRUCell, LayerNormLSTMCell, LayerNormRNNCell
from normkit.activations.scale_norm import FixNorm
from normkit.catalogue.methods import METHODS
from normkit.core.errors import OptionError, check_options
from normkit.engine.layer import Layer
from normkit.surgery.norms import FromOne, is_norm
from normkit.weights.attachment import attach

Target = Literal[0, 1]

_BIAS_NAMES = ("bias", "beta", "shift", "b")
_GAIN_NAMES = ("weight", "group_weight")

# Class, mask and register tokens, and embeddings of positions, as vision and language models name them.
_ROLES = re.compile(
    r"(cls|class|dist|mask|register|reg|storage)_?tokens?$|pos(ition)?(al)?_?emb(ed(ding)?s?)?(\.weight)?$"
)
_OURS = (Layer, LearnedScale, *(card.module for card in METHODS if card.kind == "activation"))
# Their own matrices are those of linear layers, and decay as such; their norms are children, or one number.
_LINEAR = (FixNorm, LayerNormRNNCell, LayerNormLSTMCell, LayerNormGRUCell)
# Their weights are pools, units, or start at 0: 1 is nothing to pull them to.
_NOT_AROUND_ONE = (GDN, HeegerNorm, LyuSimoncelliNorm, GlobalResponseNorm, LearnedScale)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    norm_decay: float = 0.0,
    bias_decay: float = 0.0,
    other_decay: float = 0.0,
    gamma_target: Target = 0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, with decays of their own for weights, norms, biases of other layers, and what is none of these.

    A parameter is a norm's if its class is one of normkit's or torch's norms, or looks like one; a layer inside a norm is a
    layer like others. Parameters that need no gradients are left out; a shared one is in the group of the first that holds it.
    With ``gamma_target=1`` each norm's gain becomes 1 + d with d the parameter, in place: any optimizer's decay then pulls the
    gain towards 1. Its key in the state_dict is then ``parametrizations.weight.original``; ``normkit.fold`` gives the plain one
    back. Norms that keep their gain as a difference already are not known as such: use 0 for them.

    None of these is, by dimension, a vector or a number such as a LayerScale or the D of Mamba; by mark, a parameter with a
    true attribute ``_no_weight_decay``, or one that ``no_weight_decay()`` of the module that holds it, or of one around that,
    names; by role, a class, mask or register token or an embedding of positions, known by its name.

    Args:
        model: any module.
        weight_decay: of every parameter that is in no norm and no bias.
        norm_decay: of the gains and biases of norms. Default: 0.
        bias_decay: of other biases. Default: 0.
        other_decay: of what is none of these. Default: 0.
        gamma_target: what the gain decays to: 0, as optimizers do, or 1. Default: 0.

    Returns a dict each for ``"weights"``, ``"norms"``, ``"biases"`` and ``"others"``, by ``"name"``, where there are any; with
    the names of its parameters as ``"param_names"``, as optimizers of named parameters have them: the table of what went where.

    Raises:
        OptionError: a negative decay, or another target.

    Reference: Summers and Dinneen (2020), https://arxiv.org/abs/1906.03548, section 3.3.

    >>> groups = param_groups(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), 1e-4, norm_decay=1e-5)
    >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in groups]
    [('weights', 0.0001, 1), ('norms', 1e-05, 2), ('biases', 0.0, 1)]
    """
    given = {"weight_decay": weight_decay, "norm_decay": norm_decay}
    given |= {"bias_decay": bias_decay, "other_decay": other_decay}
    for name, value in given.items():
        if not value >= 0:
            raise OptionError(f"param_groups: {name}={value}; wanted a number from 0")
    check_options("param_groups", gamma_target=(gamma_target, Target))
    if gamma_target == 1:
        for module, name, _ in list(_gains(model)):
            if not parametrize.is_parametrized(module, name):
                attach(module, name, FromOne())
    in_norms = {id(parameter) for module in _norms(model) for parameter in _parameters(module)}
    marked = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", tuple)()
    }
    groups: dict[str, dict[str, nn.Parameter]] = {"weights": {}, "norms": {}, "biases": {}, "others": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.removesuffix(".original").rsplit(".", 1)[-1]
        other = name in marked or getattr(parameter, "_no_weight_decay", False) or _ROLES.search(name)
        kind = "norms" if id(parameter) in in_norms else "biases" if _is_bias(last) else "weights"
        groups["others" if other or (kind == "weights" and parameter.dim() < 2) else kind][name] = parameter
    return [
        {"params": [*parameters.values()], "weight_decay": decay, "name": name, "param_names": [*parameters]}
        for (name, parameters), decay in zip(groups.items(), given.values(), strict=True)
        if parameters
    ]


def norm_penalty(model: nn.Module, decay: float, gamma_target: Target = 1) -> Tensor:
    """The decay of all norms of a model as a number to be added to the loss.

    decay / 2 * (|bias|^2 + |gain - gamma_target|^2)

    0 for a model without norms; OptionError for a ``gamma_target`` other than 1, the default, and 0.

    Returns one number; 0 for a model without norms.

    Raises:
        OptionError: another target.

    Reference: Summers and Dinneen (2020), https://arxiv.org/abs/1906.03548, section 3.3.

    >>> norm = nn.LayerNorm(2)
    >>> norm.weight.data, norm.bias.data = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0])
    >>> norm_penalty(norm, 0.1)  # 0.05 * (4 + 4)
    tensor(0.4000, grad_fn=<MulBackward0>)
    """
    check_options("norm_penalty", gamma_target=(gamma_target, Target))
    terms = [(gain - gamma_target).square().sum() for _, _, gain in _gains(model)]
    for module in _norms(model):
        own = module.named_parameters(recurse=False) if not isinstance(module, (GDN, *_LINEAR)) else ()
        terms += [value.square().sum() for name, value in own if _is_bias(name)]
    return 0.5 * decay * torch.stack(terms).sum() if terms else torch.zeros(())


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        chains = module.parametrizations.values() if parametrize.is_parametrized(module) else ()  # pyright: ignore
        from_one = any(isinstance(part, FromOne) for chain in chains for part in chain)
        if isinstance(module, _OURS) or is_norm(module) or from_one:
            yield module


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """A norm's own, without those of layers in it, as of one that computes the gain."""
    yield from (p for p in module.parameters(recurse=False) if p.dim() == 0 or not isinstance(module, _LINEAR))
    if parametrize.is_parametrized(module):
        yield from module.get_submodule("parametrizations").parameters()


def _gains(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in _norms(model):
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            own += list(module.parametrizations)  # pyright: ignore[reportArgumentType]
        for name in own:
            if _is_gain(module, name):
                yield module, name, getattr(module, name)


def _is_gain(module: nn.Module, name: str) -> bool:
    if not isinstance(module, _OURS):
        return not _is_bias(name)
    from_features = isinstance(module, ConditionalNorm) and module.features is not None  # its gain is 1 + v weight
    return name in _GAIN_NAMES and not (from_features or isinstance(module, (*_NOT_AROUND_ONE, *_LINEAR)))


def _is_bias(name: str) -> bool:
    return name in _BIAS_NAMES or name.startswith("bias_") or name.endswith("_bias")
