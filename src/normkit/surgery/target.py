"""The norm to convert to: read from its word, and built for the place where another norm stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm
from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.catalogue import METHODS
from normkit.core.card import Card
from normkit.core.errors import NotationError, SurgeryError
from normkit.core.support import divisors, show
from normkit.engine.layer import Layer
from normkit.surgery.changes import label
from normkit.surgery.norms import Norm
from normkit.surgery.select import closest

_OVER = ("c", "c *")
OVER_POSITIONS = "statistics over positions: in a causal model tokens see later ones, and padding counts"


@dataclass(frozen=True)
class Target:
    """A norm to convert to, as its word says it: ``"bn"``, ``"gn:8"``, ``"ln"``, ``"ln:c"``, ``"none"``.

    Args:
        word: as in recipes.
        name: of the method in the catalogue, or ``"none"``.
        option: the number of groups of a group norm; the axes ``c`` or ``c *`` of a layer or RMS norm on channels first.
    """

    word: str
    name: str
    option: str = ""

    def __str__(self) -> str:
        default = {"layer_norm": "c *", "rms_norm": "c *"}.get(self.name, "")
        return self.word if self.option == default else f"{self.word}:{self.option}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a word or a long name.

        Args:
            text: ``bn``, ``gn:32``, ``ln``, ``in``, ``rms``, ``none``, or ``group_norm:32`` and the like. ``gn`` alone is
                ``gn:32``. ``ln:c`` and ``rms:c`` normalize each position of a channels-first input by itself.

        Raises:
            NotationError: there is no such norm, or it takes no such option.

        >>> str(Target.parse("group_norm:8")), str(Target.parse("gn")), str(Target.parse("ln:c"))
        ('gn:8', 'gn:32', 'ln:c')
        """
        if not isinstance(text, str):
            raise NotationError(f"norm {text!r} is no word; wanted one of {norm_list()}, e.g. 'ln'")
        head, _, option = text.strip().partition(":")
        word = head.strip().lower().replace("-", "_")
        option = " ".join(option.split())
        card = norm_cards().get(word)
        if card is None and word != "none":
            raise NotationError(
                f"norm {head!r} is not known{closest(word, tuple(norm_words()))}; norms that exist: {norm_list()}"
            )
        name, word = ("none", "none") if card is None else (card.name, card.word or card.name)
        if name == "group_norm":
            if not (option or "32").isdecimal() or int(option or "32") < 1:
                raise NotationError(f"norm {text!r}: got {option!r} groups, wanted a whole number from 1, e.g. gn:32")
            return cls(word, name, str(int(option or "32")))
        if name in ("layer_norm", "rms_norm"):
            if (option or "c *") not in _OVER:
                raise NotationError(f"norm {text!r}: got the axes {option!r}, wanted c, or none for c *, e.g. {word}:c")
            return cls(word, name, option or "c *")
        if option:
            raise NotationError(f"norm {text!r} takes no option; write {word}")
        return cls(word, name)

    def is_kept(self, norm: Norm) -> bool:
        """Whether a norm is this one already."""
        if norm.kind != self.name:
            return False
        if self.name == "group_norm":
            return norm.option == self.option
        return self.name not in ("layer_norm", "rms_norm") or norm.axes != "n c *" or norm.option == self.option

    def build(self, name: str, norm: Norm, like: Tensor) -> tuple[nn.Module, str]:
        """Make this norm for the place of another, with its parameters.

        Args:
            name: of the layer, for messages.
            norm: what stands there.
            like: gives dtype and device where the norm has no parameters.

        Returns:
            The new layer, and what was dropped or created.

        Raises:
            SurgeryError: it can't stand there.
        """
        if self.name == "none":
            return nn.Identity(), "its weight and bias dropped" if norm.weight is not None else ""
        if norm.axes == "trailing" and self.name not in ("layer_norm", "rms_norm"):
            raise SurgeryError(
                f"{label(name)}: it normalizes over the axes {show(norm.shape)} with a weight for each element, where {self} has "
                "one for each channel; only ln, rms and none can stand there: choose one of these, or leave it out with "
                "where= of convert"
            )
        if self.name == "group_norm" and norm.channels % int(self.option):
            raise SurgeryError(
                f"{label(name)}: {norm.channels} channels do not split into {self.option} groups; the groups must divide "
                f"{norm.channels}: {divisors(norm.channels)}; choose gn: with one of these, or leave the layer "
                "out with where= of convert"
            )
        gain = norm.weight if norm.weight is not None else norm.bias
        like = like if gain is None else gain
        new = self._make(name, norm, gain is not None, {"dtype": like.dtype, "device": like.device})
        return new, "; ".join(
            filter(None, [norm.note, *_carry(norm, new), *_memory(norm, new), *_positions(norm, new)])
        )

    def _make(self, name: str, norm: Norm, affine: bool, factory: dict[str, Any]) -> nn.Module:
        channels, eps = norm.channels, norm.guard(factory["dtype"])
        layout = "n * c" if norm.axes == "n * c" else "n c *"
        shape = norm.shape if norm.axes == "trailing" else channels
        over = self.option if norm.axes == "n c *" else None
        match self.name:
            case "batch_norm":
                return BatchNorm(channels, eps, norm.momentum, affine, layout=layout, spatial=norm.spatial, **factory)
            case "instance_norm":
                # Of torch's classes instance norms alone take one sample; a batch norm's (N, C) must not become one.
                spatial = norm.spatial if norm.kind == "instance_norm" else None
                return InstanceNorm(channels, eps, norm.momentum, affine, layout=layout, spatial=spatial, **factory)
            case "group_norm":
                return GroupNorm(int(self.option), channels, eps, affine, layout=layout, **factory)
            case "layer_norm":
                return LayerNorm(shape, eps, affine, over=over, **factory)
            case "rms_norm":
                return RMSNorm(shape, eps, affine, over=over, **factory)
        card = norm_cards()[self.name]
        first = card.rule is not None and card.rule.support.names[0] == "n"
        if first != (norm.axes == "n c *"):
            raise SurgeryError(
                f"{label(name)}: its input is laid out as {norm.axes!r}, which {card.name} does not take"
            )
        new = card.make(channels).to(**factory)
        if hasattr(new, "eps"):
            vars(new)["eps"] = eps
        return new


def _carry(norm: Norm, new: nn.Module) -> list[str]:
    """Hand the parameters over, the very objects; say what had no place and what was made."""
    notes = []
    if isinstance(getattr(new, "weight", None), Tensor):
        new.register_parameter("weight", norm.weight)
    if isinstance(getattr(new, "bias", None), Tensor):
        if norm.has_bias or norm.weight is None:
            new.register_parameter("bias", norm.bias)
        else:
            new.bias.requires_grad_(norm.weight.requires_grad)
            notes.append("bias created")
    elif norm.bias is not None:
        notes.append("bias dropped")
    return notes


def _memory(norm: Norm, new: nn.Module) -> list[str]:
    if isinstance(new, BatchNorm) and norm.tracks and set(new._buffers) <= set(norm.running):
        for name in new._buffers:
            new.register_buffer(name, norm.running[name])  # the very object, unless it is of a half type
        return []
    if isinstance(getattr(new, "running_mean", None), Tensor):
        return ["running statistics start anew: train before evaluation"]
    return ["running statistics dropped"] if norm.tracks else []


def _positions(norm: Norm, new: nn.Module) -> list[str]:
    """Say where each position was normalized by itself and is so no more."""
    alone = norm.kind in ("layer_norm", "rms_norm") and norm.option != "c *" and norm.axes != "trailing"
    if alone and isinstance(new, Layer) and "*" in new.rule.support.reduced:
        return [OVER_POSITIONS]
    return []


def norm_cards() -> dict[str, Card]:
    """The activation norms of the catalogue by word and by name; one without a word stands beside a norm, not for one."""
    cards = [card for card in METHODS if card.kind == "activation" and card.word and card.rule is not None]
    return {key: card for card in cards for key in (card.word, card.name, card.name.replace("_", ""))}


def norm_words() -> list[str]:
    """The words of norms in recipes."""
    return ["none", *dict.fromkeys(card.word for card in norm_cards().values())]


def norm_list() -> str:
    """The words of norms as a message lists them."""
    return ", ".join("gn:GROUPS" if word == "gn" else word for word in norm_words())


def any_tensor(model: nn.Module) -> Tensor:
    """A floating tensor of the model, whose dtype and device a layer without parameters follows."""
    tensors = (tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point())
    return next(tensors, torch.empty(0))
