"""Surgery: change the norms and weights of an existing model, in place, and say what was changed."""

from normkit.surgery.accelerate import accelerate
from normkit.surgery.bake import plain
from normkit.surgery.changes import Change, Changes
from normkit.surgery.condition import condition
from normkit.surgery.convert import convert
from normkit.surgery.data_dependent_init import data_dependent_init
from normkit.surgery.decay import FromOne, norm_penalty, param_groups
from normkit.surgery.example_weighing import choose_alpha, weigh_examples
from normkit.surgery.fold import fold
from normkit.surgery.framework import adopt
from normkit.surgery.freeze import freeze, unfreeze
from normkit.surgery.place_norms import place_norms
from normkit.surgery.reassign_spectral import reassign_spectral_
from normkit.surgery.recalibrate import recalibrate
from normkit.surgery.recipe import Recipe, applicable_words, apply_recipe, why_not
from normkit.surgery.redundant_bias import drop_redundant_bias
from normkit.surgery.select import select
from normkit.surgery.translate import accept, translate

__all__ = [
    "Change",
    "Changes",
    "FromOne",
    "Recipe",
    "accelerate",
    "accept",
    "adopt",
    "applicable_words",
    "apply_recipe",
    "choose_alpha",
    "condition",
    "convert",
    "data_dependent_init",
    "drop_redundant_bias",
    "fold",
    "freeze",
    "norm_penalty",
    "param_groups",
    "place_norms",
    "plain",
    "reassign_spectral_",
    "recalibrate",
    "select",
    "translate",
    "unfreeze",
    "weigh_examples",
    "why_not",
]
