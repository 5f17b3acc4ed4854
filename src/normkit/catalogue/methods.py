"""METHODS: every method, by the names of the files. Tests, pages, recipes and benchmarks go through it."""

from importlib import import_module

from normkit.catalogue.entry import find, spellings
from normkit.core.card import Card

# A file may hold several methods that share an idea; its cards keep their order.
_FILES = {
    "preprocessing": "feature_scaling sample_scaling image_standardization whitening",
    "activations": "batch_norm ghost_batch_norm batch_group_norm batch_renorm sync_batch_norm batch_channel_norm "
    "recurrent_batch_norm layer_norm rms_norm scale_norm query_key_norm conditioned_tokens hypersphere "
    "adaptive_layer_norm recurrent_layer_norm group_norm instance_norm conditional_norm global_response_norm switchable_norm "
    "local_response_norm divisive_norm gdn dynamic_tanh gated_rms_norm",
    "weights": "weight_norm spectral_norm weight_standardization weight_conditioning preconditioning",
    "gradients": "grad_norm gradient_normalizer muon",
}

METHODS: tuple[Card, ...] = tuple(
    card
    for folder, files in _FILES.items()
    for file in files.split()
    for card in vars(import_module(f"normkit.{folder}.{file}")).values()
    if isinstance(card, Card)
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
