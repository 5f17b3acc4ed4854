"""METHODS: every method, one line per file. Tests, pages, recipes and benchmarks go through it."""

from importlib import import_module

from normkit.catalogue.entry import find, spellings
from normkit.core.card import Card

# A file may hold several methods that share an idea; its cards keep their order.
_FILES = (
    "preprocessing.feature_scaling",
    "preprocessing.robust_scaling",
    "preprocessing.sample_scaling",
    "preprocessing.image_standardization",
    "preprocessing.whitening",
    "activations.batch_norm",
    "activations.ghost_batch_norm",
    "activations.batch_group_norm",
    "activations.batch_renorm",
    "activations.sync_batch_norm",
    "activations.batch_channel_norm",
    "activations.recurrent_batch_norm",
    "activations.layer_norm",
    "activations.rms_norm",
    "activations.scale_norm",
    "activations.query_key_norm",
    "activations.hypersphere",
    "activations.adaptive_layer_norm",
    "activations.recurrent_layer_norm",
    "activations.group_norm",
    "activations.instance_norm",
    "activations.conditional_norm",
    "activations.global_response_norm",
    "activations.filter_response_norm",
    "activations.positional_norm",
    "activations.switchable_norm",
    "activations.local_response_norm",
    "activations.local_context_norm",
    "activations.divisive_norm",
    "activations.gdn",
    "activations.dynamic_tanh",
    "activations.gated_rms_norm",
    "weights.weight_norm",
    "weights.spectral_norm",
    "weights.weight_standardization",
    "weights.weight_conditioning",
    "weights.preconditioning",
    "gradients.grad_norm",
    "gradients.gradient_normalizer",
    "gradients.adaptive_clipping",
    "gradients.muon",
)

METHODS: tuple[Card, ...] = tuple(
    card for file in _FILES for card in vars(import_module(f"normkit.{file}")).values() if isinstance(card, Card)
)


def method(name: str) -> Card:
    """Find the card of a method, by its name or its word in recipes.

    Args:
        name: e.g. ``"group_norm"`` or ``"gn"``; case, spaces and hyphens do not matter.

    Raises:
        NotationError: no such method; the message names similar ones, and all.

    >>> method("gn").title
    'Group normalization'
    """
    known = {card.name: card for card in METHODS}
    return known[find(name, {card.name: spellings(card.name, card.word, card.module.__name__) for card in METHODS})]
