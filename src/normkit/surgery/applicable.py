"""Which recipes and which words a model can have, found by trying them on it without effect."""

from __future__ import annotations

from typing import Any

from torch import nn

from normkit.core.errors import SurgeryError
from normkit.surgery.recipe import Recipe, apply_recipe, weight_words
from normkit.surgery.target import norm_cards, norm_words
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import forked


class _Undo(Exception):
    """Ends a trial."""


def why_not(model: nn.Module, recipe: str | Recipe, example: Any = None) -> str:
    """Why a model can't have a recipe.

    Args:
        model: any module; it is left as it is.
        recipe: as for ``apply_recipe``.
        example: likewise. Default: None.

    Returns:
        The reason, or "" where ``apply_recipe`` would do it.

    Raises:
        NotationError: the recipe can't be read.

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

    Args:
        model: any module; it is left as it is.
        example: an input of it, as for ``apply_recipe``. Default: None.

    Returns:
        The reason by recipe, "" where the model can have it: the words of norms, each in the place of all the model's norms (of
        those with groups also ``gn:gcd32``), and the words of weight methods as ``keep+ws``, each on its usual layers.

    >>> found = applicable_words(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
    >>> [word for word in ("bn", "rms", "dyt", "lrn", "keep+wn", "keep+ws") if not found[word]]
    ['bn', 'rms', 'dyt', 'keep+wn']
    """
    cards = dict.fromkeys(norm_cards().values())
    grouped = [
        f"{card.word}:gcd{card.option.default}" for card in cards if card.option and "GROUPS" in card.option.name
    ]
    recipes = ["keep", *norm_words(), *grouped, *(f"keep+{word}" for word in weight_words())]
    return {recipe: why_not(model, recipe, example) for recipe in recipes}
