"""METHODS: every method, one line each. Tests, pages, recipes and benchmarks go through it."""

from __future__ import annotations

from difflib import get_close_matches

from normkit.activations import (
    adaptive_instance_norm,
    adaptive_layer_norm,
    batch_channel_norm,
    batch_group_norm,
    batch_norm,
    batch_renorm,
    conditional_norm,
    divisive_norm,
    dynamic_tanh,
    exemplar_norm,
    film,
    filter_response_norm,
    fix_norm,
    gdn,
    ghost_batch_norm,
    global_response_norm,
    group_norm,
    hypersphere,
    instance_norm,
    layer_norm,
    local_context_norm,
    local_contrast_norm,
    local_response_norm,
    partial_rms_norm,
    positional_norm,
    query_key_norm,
    recurrent_layer_norm,
    rms_norm,
    scale_norm,
    switchable_norm,
    sync_batch_norm,
)
from normkit.core.card import Card
from normkit.core.errors import NotationError
from normkit.gradients import grad_norm, gradient_normalizer
from normkit.inputs import feature_scaling, image_standardization, robust_scaling, sample_scaling, whitening
from normkit.weights import spectral_norm, weight_conditioning, weight_norm, weight_standardization

METHODS: tuple[Card, ...] = (
    feature_scaling.CARD_MIN_MAX,
    feature_scaling.CARD_Z_SCORE,
    feature_scaling.CARD_MEAN,
    feature_scaling.CARD_MAX_ABS,
    robust_scaling.CARD,
    sample_scaling.CARD_UNIT_LENGTH,
    image_standardization.CARD,
    sample_scaling.CARD_GLOBAL_CONTRAST,
    whitening.CARD,
    batch_norm.CARD,
    layer_norm.CARD,
    rms_norm.CARD,
    hypersphere.CARD,
    recurrent_layer_norm.CARD_RNN,
    recurrent_layer_norm.CARD_LSTM,
    recurrent_layer_norm.CARD_GRU,
    query_key_norm.CARD,
    partial_rms_norm.CARD,
    fix_norm.CARD,
    scale_norm.CARD,
    film.CARD,
    adaptive_layer_norm.CARD,
    adaptive_layer_norm.CARD_ZERO,
    group_norm.CARD,
    instance_norm.CARD,
    local_response_norm.CARD,
    global_response_norm.CARD,
    adaptive_instance_norm.CARD,
    filter_response_norm.CARD,
    dynamic_tanh.CARD,
    local_contrast_norm.CARD,
    local_contrast_norm.CARD_JARRETT,
    divisive_norm.CARD,
    divisive_norm.CARD_LYU_SIMONCELLI,
    divisive_norm.CARD_HEEGER,
    positional_norm.CARD,
    switchable_norm.CARD,
    conditional_norm.CARD_INSTANCE,
    conditional_norm.CARD_BATCH,
    conditional_norm.CARD_SPATIAL,
    gdn.CARD,
    gdn.CARD_INVERSE,
    local_context_norm.CARD,
    exemplar_norm.CARD,
    weight_norm.CARD,
    spectral_norm.CARD,
    weight_standardization.CARD,
    weight_conditioning.CARD,
    ghost_batch_norm.CARD,
    sync_batch_norm.CARD,
    batch_renorm.CARD,
    batch_group_norm.CARD,
    batch_group_norm.CARD_WEIGHING,
    batch_channel_norm.CARD,
    batch_channel_norm.CARD_ESTIMATED,
    grad_norm.CARD,
    gradient_normalizer.CARD,
)


def method(name: str) -> Card:
    """The card of a method, by its name or its word in recipes.

    Args:
        name: e.g. ``"group_norm"`` or ``"gn"``; case, spaces and hyphens do not matter.

    Returns:
        The card.

    Raises:
        NotationError: no such method; the message lists those that exist.

    >>> method("gn").title
    'Group normalization'
    """
    wanted = name.strip().lower().replace("-", "_").replace(" ", "_")
    for card in METHODS:
        if wanted in (card.name, card.word, card.name.replace("_", ""), card.module.__name__.lower()):
            return card
    names = [card.name for card in METHODS]
    close = get_close_matches(wanted, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise NotationError(f"no method {name!r}; {hint}those that exist: {', '.join(names)}")
