"""The norm to convert to: read from its word, and built for the place where another norm stands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.activations.rms_norm import RMSNorm
from normkit.catalogue import METHODS
from normkit.core.card import Card
from normkit.core.errors import NotationError, OptionError, SurgeryError, closest
from normkit.core.place import Place
from normkit.core.support import show
from normkit.engine.layer import Layer
from normkit.engine.reference import check_activation
from normkit.surgery.changes import label
from normkit.surgery.norms import FrozenBatchNorm, Norm, count_from_one, has_flag, reach

OVER_POSITIONS = "statistics over positions: in a causal model tokens see later ones, and padding counts"
_FROZEN = "frozen_bn"
_MODULES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
}
_LEAVE = "on_refusal='leave'"
_READS = {
    "n c *": "channels on axis 1, as a convolution gives them",
    "n * c": "features on the last axis, as a linear layer gives them",
}


@dataclass(frozen=True)
class Target:
    """A norm to convert to, as its word says it: ``"bn"``, ``"gn:8"``, ``"ln"``, ``"ghost:16"``, ``"none"``."""

    word: str
    name: str
    option: str = ""

    def __str__(self) -> str:
        return f"{self.word}:{self.option}" if self.option else self.word

    @property
    def card(self) -> Card | None:
        """Of the method; None for ``none``."""
        return norm_cards().get(self.name)

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a word or a long name.

        >>> [str(Target.parse(text)) for text in ("group_norm:8", "gn", "ln:c", "ghost")]
        ['gn:8', 'gn:32', 'ln:c', 'ghost:16']
        """
        if not isinstance(text, str):
            raise NotationError(f"norm {text!r} is no word; wanted one of {norm_list()}, e.g. 'ln'")
        head, colon, option = (part.strip() for part in text.partition(":"))
        word, cards = head.lower().replace("-", "_"), norm_cards()
        if word in (_FROZEN, "frozen_batch_norm") and not colon:
            return cls(_FROZEN, "frozen_batch_norm")
        word = {"sync_bn": "sync"}.get(word, word)
        card = cards.get(word)
        if card is None and word != "none":
            hint = closest(word, tuple([*norm_words(), *cards]))
            raise NotationError(f"norm {head!r} is not known{hint}; norms that exist: {norm_list()}{_why_not(word)}")
        name, word = ("none", "none") if card is None else (card.name, card.word)
        takes = None if card is None else card.option
        if takes is None:
            if colon:
                raise NotationError(f"norm {text!r} takes no option; write {word}")
            return cls(word, name)
        if not colon:
            return cls(word, name, takes.default)
        try:
            return cls(word, name, takes.read(option))
        except ValueError:
            example = f", e.g. {word}:{takes.default}" if takes.default else ""
            raise NotationError(f"norm {text!r}: got {takes.name} {option!r}, wanted {takes.wanted}{example}") from None

    def is_kept(self, norm: Norm, made: nn.Module) -> bool:
        """Whether a norm is already what was made for its place."""
        option = None if self.card is None else self.card.option
        return norm.kind == self.name and (option is None or option.of(made) == norm.option)

    def build(self, name: str, norm: Norm, like: Tensor, *, causal: bool = True) -> tuple[nn.Module, str]:
        """Make this norm for the place of another, with its parameters."""
        card = self.card
        if self.word == _FROZEN:
            return self._frozen(name, norm)
        if card is None or card.build is None:
            return activation_module(norm), "its weight and bias dropped" if norm.weight is not None else ""
        if not norm.shape:
            raise SurgeryError(f"{label(name)}: its number of features is not known; give example=, an input")
        gain = norm.weight if norm.weight is not None else norm.bias
        like = like if gain is None else gain
        unkept = {"track_running_stats": False} if norm.track is False and not norm.tracks and has_flag(card) else {}
        axes = norm.axes if norm.axes in card.axes or norm.rank != 2 else card.axes[0]  # of (N, C) both layouts are one
        option = self.option or (norm.option if norm.axes == "trailing" else "")
        kept = {key: getattr(norm, key) for key in ("momentum", "tracks", "affine", "alone", "spatial", "kind")}
        factory = {"dtype": like.dtype, "device": like.device, **unkept}
        bias = norm.bias is not None or not norm.has_bias
        place = Place(axes, norm.shape, option, norm.guard(like.dtype), bias=bias, factory=factory, **kept)
        if place.axes not in card.axes:
            raise SurgeryError(
                f"{label(name)}: {self._misfit(card, norm)}; choose another norm, or leave it with {_LEAVE}"
            )
        try:
            new = card.build(place)
        except OptionError as error:
            raise SurgeryError(f"{label(name)}: {error}, or leave the layer with {_LEAVE}") from error
        self._take_what_follows(name, norm, new)
        if norm.track is False and norm.tracks:
            self._hold(name, card, new)
        notes = [norm.note, *_carry(card, norm, new), *_memory(norm, new), _keep(norm, new)]
        if causal and norm.alone and norm.rank != 2 and "*" in reach(card, new):
            notes.append(OVER_POSITIONS)
        return new, "; ".join(filter(None, notes))

    def _take_what_follows(self, name: str, norm: Norm, new: nn.Module) -> None:
        for key, value in (("activation", norm.activation), ("dropout", norm.dropout)):
            if not value:
                continue
            try:
                check_activation(norm.activation)  # pyright: ignore[reportArgumentType]  # one of another library is refused too
                if not isinstance(new, Layer | FrozenBatchNorm if key == "activation" else Layer):
                    raise OptionError(f"{type(new).__name__} takes no {key}")
                setattr(new, key, value)
            except OptionError:
                raise SurgeryError(
                    f"{label(name)}: it applies {value if key == 'activation' else f'dropout={value}'} too, which {self} has no "
                    f"place for; put that behind it in a layer of its own, or leave it with {_LEAVE}"
                ) from None

    def _hold(self, name: str, card: Card, new: nn.Module) -> None:
        """Let a layer keep running statistics that training leaves as they are."""
        if new._buffers.get("running_mean") is None:
            return
        if has_flag(card):
            new.track_running_stats = False  # pyright: ignore[reportArgumentType]
        if not has_flag(card) or not isinstance(new, Layer) or new.rule.memory is None:
            raise SurgeryError(
                f"{label(name)}: track_running_stats was set to False, so that training leaves its running statistics as they "
                f"are, which {self} can't do; set it back to True, drop the buffers, or leave it with {_LEAVE}"
            )

    def _frozen(self, name: str, norm: Norm) -> tuple[nn.Module, str]:
        mean, var = (norm.running.get(key) for key in ("running_mean", "running_var"))
        if norm.kind not in ("batch_norm", "sync_batch_norm", "frozen_batch_norm") or mean is None or var is None:
            raise SurgeryError(
                f"{label(name)}: {self} is made of a batch normalization with running statistics; choose those with "
                f"source='bn', or leave it with {_LEAVE}"
            )
        eps, axes = norm.guard(mean.dtype), norm.axes
        new = FrozenBatchNorm(norm.shape[0], eps, layout=axes, device=mean.device, dtype=mean.dtype)
        new._buffers.update(running_mean=mean, running_var=var)
        for key, value in (("weight", norm.weight), ("bias", norm.bias)):
            if value is not None:
                new._buffers[key] = value.detach().clone()
        self._take_what_follows(name, norm, new)
        return new, "weight and bias are buffers now" if norm.weight is not None else ""

    def _misfit(self, card: Card, norm: Norm) -> str:
        if norm.axes == "trailing":
            words = [each.word for each in dict.fromkeys(norm_cards().values()) if "trailing" in each.axes]
            return (
                f"it normalizes over the axes {show(norm.shape)} with a weight for each element, where {self} has one for each "
                f"channel; only {', '.join(words)} and none can stand there"
            )
        return f"{self} reads {_READS[card.axes[0]]}; the input here has {_READS[norm.axes]}"


def _carry(card: Card, norm: Norm, new: nn.Module) -> list[str]:
    """Hand the parameters over, the very objects; say what had no place and what was made."""
    dropped, taken = [], set()
    for key, old in (("weight", norm.weight), ("bias", norm.bias)):
        if old is None:
            continue
        if key in card.takes and isinstance(new._parameters.get(key), Tensor):
            if key == "weight" and norm.offset:
                _count_from(norm.offset, new, old)
            else:
                new.register_parameter(key, old)
            taken.add(key)
        else:
            dropped.append(key)
    kept = {id(norm.weight), id(norm.bias)}
    created = {k: p for k, p in new.named_parameters() if id(p) not in kept and k not in taken}
    for parameter in created.values():
        parameter.requires_grad_(norm.weight is None or norm.weight.requires_grad)
    notes = [f"{', '.join(dropped)} dropped"] if dropped else []
    notes += ["its gain is 1 + parametrizations.weight.original"] if parametrize.is_parametrized(new) else []
    new_names = ", ".join(dict.fromkeys(key.partition(".")[0] for key in created))
    return [*notes, f"{new_names} created"] if created else notes


def _count_from(offset: float, new: nn.Module, weight: nn.Parameter) -> None:
    """Give a layer a gain of an offset plus a weight, the very parameter where it can."""
    if isinstance(new, RMSNorm):
        new.register_parameter("weight", weight)
        new.offset = offset
    elif offset == 1:
        count_from_one(new, weight)
    else:
        new.register_parameter("weight", nn.Parameter(weight.detach() + offset, requires_grad=weight.requires_grad))


def activation_module(norm: Norm) -> nn.Module:
    """What follows a norm, its activation and its dropout, as a layer of its own."""
    act, drop = norm.activation, [nn.Dropout(norm.dropout)] if norm.dropout else []
    parts = ([] if act is None else [act if isinstance(act, nn.Module) else _MODULES[act]()]) + drop
    return nn.Sequential(*parts) if len(parts) > 1 else parts[0] if parts else nn.Identity()


def _keep(norm: Norm, new: nn.Module) -> str:
    """Let a layer keep its output for the backward pass if the norm did; a note where it can't."""
    if norm.save == "output":
        if not isinstance(new, Layer):
            return "keeps its input"
        try:
            new.save = norm.save
        except OptionError:
            return "keeps its input"
    return ""


def _memory(norm: Norm, new: nn.Module) -> list[str]:
    own = {key: buffer for key, buffer in new._buffers.items() if buffer is not None}
    if "running_mean" not in own:
        return ["running statistics dropped"] if norm.tracks else []
    # Frozen ones have no count.
    old = {key: norm.running.get(key) for key in own if key in norm.running or key != "num_batches_tracked"}
    if norm.tracks and all(buffer is not None and buffer.shape == own[key].shape for key, buffer in old.items()):
        for key, buffer in old.items():
            new.register_buffer(key, buffer)  # the very object, where the layer keeps its dtype
        return []
    return ["running statistics restart: train before evaluation"]


def norm_cards() -> dict[str, Card]:
    """The methods that can stand in a norm's place, by word and by name."""
    cards = [card for card in METHODS if card.kind == "activation" and card.word]
    return {key: card for card in cards for key in (card.word, card.name, card.name.replace("_", ""))}


def norm_words() -> list[str]:
    """The words of norms in recipes."""
    return ["none", *dict.fromkeys(card.word for card in norm_cards().values()), _FROZEN]


def norm_list() -> str:
    """The words of norms, with their options, as a message lists them."""
    return ", ".join(["none", *dict.fromkeys(card.words for card in norm_cards().values()), _FROZEN])


def _why_not(name: str) -> str:
    """The reason why a method that exists has no word."""
    cards = [card for card in METHODS if card.kind == "weight"]
    weights = {key: card.word or card.name for card in cards for key in (card.word, card.name)}
    if weights.get(name):
        return f"; {name} is a weight method: apply_recipe(model, 'keep+{weights[name]}') puts it on"
    why = next((card.wordless for card in METHODS if name in (card.name, card.name.replace("_", ""))), "")
    return f"; {name} can't stand in a norm's place: {why}" if why else ""


def any_tensor(model: nn.Module) -> Tensor:
    """A floating tensor of the model, whose dtype and device a layer without parameters follows."""
    tensors = (tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point())
    return next(tensors, torch.empty(0))
