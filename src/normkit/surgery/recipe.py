"""Recipes: a combination of normalizations in the literature's shorthand, such as ``bn+ws`` or ``gn:32+e@first_last``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normkit.catalogue import METHODS
from normkit.core.card import Card
from normkit.core.errors import NotationError, SurgeryError, closest
from normkit.surgery.attach import Attach, attach_all
from normkit.surgery.changes import Change, Changes, PassedOver, Refusal, Refusals
from normkit.surgery.convert import convert
from normkit.surgery.select import check_place, select
from normkit.surgery.target import Target, norm_cards, norm_list, norm_words
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import forked, try_on
from normkit.weights import (
    inverse_root_diagonal,
    inverse_root_rows,
    precondition,
    spectral_conditioning,
    spectral_norm,
    weight_conditioning,
    weight_norm,
    weight_standardization,
)
from normkit.weights.layout import weight_layout

# The paper conditions the first and the last layer; weight standardization is for convolutions that a norm follows, not for
# the linear head; spectral conditioning for queries, keys and values. Every other method goes on all layers.
_PLACES = {"e": "first_last", "ws": "convolutions", "sc": "attention"}
_MODES = {
    "e": ("row", "col", "rowcol", "row:learned", "col:learned", "rowcol:learned"),
    "preconditioning": ("rows", "jacobi"),
}


@dataclass(frozen=True)
class Weight:
    """One weight method of a recipe: its word, its mode where it has several, and where it goes."""

    word: str
    mode: str = ""
    where: str = "all"

    def __str__(self) -> str:
        mode = "" if self.mode == _MODES.get(self.word, ("",))[0] else f":{self.mode}"
        place = "" if self.where == _PLACES.get(self.word, "all") else f"@{self.where}"
        return f"{self.word}{mode}{place}"

    @property
    def what(self) -> str:
        """The method's name with its mode, for rows."""
        return f"{_weight_cards()[self.word].name}{self.mode and ':'}{self.mode}"

    def put(self, layer: nn.Module, name: str) -> object:
        """Put the method on one weight of a layer."""
        return _attachment(self)(layer, name)


@dataclass(frozen=True)
class Recipe:
    """An activation norm, then weight methods in the order in which they are put on, the innermost first.

    ``norm ("+" weight ("@" where)?)*``

    ===========  ==========================================================================================
    ``norm``     ``keep`` (as it is), ``none`` (removed), or a word of the catalogue: ``bn``, ``gn:32``, ``ln``,
                 ``ghost:16``, ...; ``normkit list`` shows all
    ``weight``   ``ws``, ``wn``, ``sn``, ``sc``, ``e`` (rows), ``e:col``, ``e:rowcol``, each with ``:learned``
                 behind it for one learned scalar per layer: ``e:row:learned``
    ``where``    ``first_last`` (of ``e``, if not said), ``convolutions`` (of ``ws``), ``attention`` (of ``sc``),
                 ``all`` (of the others), ``hidden``, ``re:PATTERN``
    ===========  ==========================================================================================

    A ``+`` in a pattern before what reads as a weight term begins that term.

    >>> Recipe.parse("bn + e:row@first_last"), str(Recipe.parse("group_norm+ws@all+e:col"))
    (Recipe('bn+e'), 'gn:32+ws@all+e:col')
    """

    norm: Target | None
    weights: tuple[Weight, ...] = ()

    def __str__(self) -> str:
        return "+".join(["keep" if self.norm is None else str(self.norm), *map(str, self.weights)])

    def __repr__(self) -> str:
        return f"Recipe({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe, of which ``str`` is the one way to write it; NotationError for what can't be read lists what exists."""
        if not isinstance(text, str):
            raise NotationError(f"recipe {text!r} is no text; wanted a norm and weight methods, e.g. 'bn+e'")
        first, *rest = _terms(text)
        head = first.partition("@")[0].partition(":")[0].strip().lower().replace("-", "_")
        if head in _weight_cards() or not head:
            said = f"begins with {first.strip()!r}" if head else "begins without a norm"
            raise NotationError(f"recipe {text!r} {said}; a norm comes first: keep, {norm_list()}; e.g. keep+e")
        if "@" in first:
            raise NotationError(
                f"recipe {text!r}: {first.strip()!r} has a place, but a norm is converted everywhere; places go with weight words"
            )
        try:
            norm = None if head == "keep" and ":" not in first else Target.parse(first)
        except NotationError as error:
            # A norm that is not known is told which are; recipes know one more.
            also = "" if head in ("none", *norm_cards()) else ", keep"
            raise NotationError(f"recipe {text!r}: {error}{also}") from None
        weights = tuple(_weight(term, text) for term in rest)
        for k, weight in enumerate(weights):
            if any(other.word == weight.word and other.where == weight.where for other in weights[:k]):
                raise NotationError(f"recipe {text!r}: {weight.word} is said twice of {weight.where}; say it once")
        return cls(norm, weights)


def apply_recipe(
    model: nn.Module,
    recipe: str | Recipe,
    example: Any = None,
    *,
    on_refusal: Refusal = "raise",
    optimizer: torch.optim.Optimizer | None = None,
) -> Changes:
    """Give a model the normalizations of a recipe, in place: its activation norms are converted, then weights parametrized.

    ``recipe`` is e.g. ``"bn+e@first_last"``, see Recipe; ``example``, ``on_refusal`` and ``optimizer`` are those of ``convert``.

    Raises:
        NotationError: the recipe can't be read.
        SurgeryError: a part of it can't be done on this model, with the reason; the model is left as it was.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> print(apply_recipe(model, "gn:4+ws+e"))
    layer  before          after                    note
    1      BatchNorm2d(8)  GroupNorm(4, 8)          running statistics dropped
    0      Conv2d 8x3x3x3  weight_standardization
    0      Conv2d 8x3x3x3  weight_conditioning:row  over WeightStandardization
    3      Linear 2x8      weight_conditioning:row
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    try:
        with transaction(model, optimizer) as opened:
            root, rows, passed = _put(model, recipe, example, on_refusal)
            return opened.close(root, rows, passed)
    except SurgeryError as error:
        raise SurgeryError(f"{recipe}: {error}") from error


def _put(
    model: nn.Module, recipe: Recipe, example: Any, on_refusal: Refusal
) -> tuple[nn.Module, list[Change], list[PassedOver]]:
    places = []
    for weight in recipe.weights:
        try:
            places.append(select(model, weight.where))
        except SurgeryError as error:
            raise SurgeryError(f"{weight}: {error}") from None
    rows, refusals = [], Refusals("apply_recipe", on_refusal)
    if recipe.norm is not None:
        changes = convert(model, str(recipe.norm), example=example, on_refusal=on_refusal)
        model, rows = changes.model, [*changes]
        refusals += changes.passed_over
    for weight, layers in zip(recipe.weights, places, strict=True):
        rows += attach_all(model, layers, weight.put, weight.what, example, refusals)
    if example is not None and (places or recipe.norm is None):  # else convert has run it
        try_on(model, example)
    return model, rows, refusals


def _terms(text: str) -> list[str]:
    terms: list[str] = []
    for piece in text.split("+"):
        in_pattern = bool(terms) and re.search(r"@\s*re:", terms[-1]) is not None
        word = re.fullmatch(r"\s*(\w+)\s*(:\s*\w+\s*)?(@.*)?", piece, re.DOTALL)
        if in_pattern and (word is None or word[1].lower() not in _weight_cards()):
            terms[-1] += "+" + piece
        else:
            terms.append(piece)
    return terms


def _weight(term: str, text: str) -> Weight:
    head, at, where = term.partition("@")
    word, colon, mode = (part.strip().lower() for part in head.partition(":"))
    cards = _weight_cards()
    if word in norm_cards() or word in ("keep", "none"):
        raise NotationError(
            f"recipe {text!r}: {word!r} is a norm; one norm comes first, and after it weight methods: {_weight_list()}"
        )
    if word not in cards:
        said = (
            f"weight method {word!r} is not known{closest(word, tuple(cards))}"
            if word
            else "a weight method is missing after +"
        )
        raise NotationError(f"recipe {text!r}: {said}; weight methods that exist: {_weight_list()}")
    word = cards[word].word or cards[word].name
    modes = _MODES.get(word, ())
    if colon and mode not in modes:
        raise NotationError(
            f"recipe {text!r}: {word} got the mode {mode!r}; modes that exist: {', '.join(modes) or 'none'}"
        )
    where = where.strip() if at else _PLACES.get(word, "all")
    try:
        check_place(where)
    except NotationError as error:
        raise NotationError(f"recipe {text!r}: {error}") from None
    return Weight(word, mode if colon else next(iter(modes), ""), where)


def _cards() -> list[Card]:
    return [card for card in METHODS if card.kind == "weight"]


def _weight_cards() -> dict[str, Card]:
    return {key: card for card in _cards() for key in (card.word, card.name) if key}


def weight_words() -> list[str]:
    """The words of weight methods in recipes, each with its modes."""
    words = [card.word or card.name for card in _cards()]
    return [term for word in words for term in (word, *(f"{word}:{mode}" for mode in _MODES.get(word, ())[1:]))]


def _weight_list() -> str:
    return ", ".join(weight_words())


def _attachment(weight: Weight) -> Attach:
    """How a word's method is put on a weight by name; a method without an entry is made by its card."""

    def by_card(layer: nn.Module, name: str) -> object:
        if name != "weight":
            raise SurgeryError(f"{weight.what} is only known for a parameter called weight")
        return _weight_cards()[weight.word].make(layer)

    def conditioned(layer: nn.Module, name: str) -> object:
        mode, learned, _ = weight.mode.partition(":")
        return weight_conditioning(layer, mode, name=name, gain="learned" if learned else 1.0)  # pyright: ignore[reportArgumentType]

    def preconditioned(layer: nn.Module, name: str) -> object:
        if weight.mode == "jacobi":
            return precondition(layer, inverse_root_diagonal, inverse_root_diagonal, name)
        return precondition(layer, inverse_root_rows, name=name)

    def lengths(layer: nn.Module, name: str) -> object:
        return weight_norm(layer, name, weight_layout(layer, name).output_axis)

    known: dict[str, Attach] = {"ws": weight_standardization, "wn": lengths, "sn": spectral_norm, "e": conditioned}
    known |= {"sc": spectral_conditioning, "preconditioning": preconditioned}
    return known.get(weight.word, by_card)


class _Undo(Exception):
    """Ends a trial."""


def why_not(model: nn.Module, recipe: str | Recipe, example: Any = None) -> str:
    """Why a model can't have a recipe; empty where ``apply_recipe`` would do it.

    Arguments are those of ``apply_recipe``, as is NotationError; the model is left as it is.

    >>> why_not(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), "bn+ws")
    "bn+ws: ws: 'convolutions' chooses nothing; layers with a weight that exist: 0"
    """
    try:
        with forked(), transaction(model):
            apply_recipe(model, recipe, example)
            raise _Undo
    except _Undo:
        return ""
    except SurgeryError as error:
        return str(error)


def applicable_words(model: nn.Module, example: Any = None) -> dict[str, str]:
    """Every word of recipes, and why a model can't have it.

    ``example`` is that of ``apply_recipe``; the model is left as it is.

    Returns the reason by recipe, "" where the model can have it: the words of norms, each in the place of all the model's norms
    (of those with groups also ``gn:gcd32``), and the words of weight methods as ``keep+ws``, each on its usual layers.

    >>> found = applicable_words(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
    >>> [word for word in ("bn", "rms", "dyt", "lrn", "keep+wn", "keep+ws") if not found[word]]
    ['bn', 'rms', 'dyt', 'keep+wn']
    """
    cards = dict.fromkeys(norm_cards().values())
    options = ((card.word, card.option) for card in cards)
    grouped = [f"{word}:gcd{option.default}" for word, option in options if option and "GROUPS" in option.name]
    recipes = ["keep", *norm_words(), *grouped, *(f"keep+{word}" for word in weight_words())]
    return {recipe: why_not(model, recipe, example) for recipe in recipes}
