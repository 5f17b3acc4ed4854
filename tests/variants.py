"""Layers with options that the catalogue's own cards leave as they are, held to the laws as those are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import normkit as nk
from laws import ACTIVATIONS, WEIGHTS
from normkit.core.card import Card
from normkit.functional import Field, RenormSchedule
from normkit.weights import spectral_norm, weight_conditioning, weight_norm, weight_standardization

_CARDS = {card.name: card for card in (*ACTIVATIONS, *WEIGHTS)}


def _variant(of: str, suffix: str, make: Any, **claims: Any) -> Card:
    if _CARDS[of].kind == "activation" and _CARDS[of].rule is not None and "rule" not in claims:
        claims["rule"] = getattr(make(4), "rule", _CARDS[of].rule)
    return replace(_CARDS[of], name=f"{of}_{suffix}", make=make, **claims)


def _vectors(x: Tensor) -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 2 * len(x)).view(len(x), 2).to(x.dtype),)


VARIANTS: list[Card] = [
    _variant("adaptive_instance_norm", "part", lambda c: nk.AdaptiveInstanceNorm(0.4)),
    _variant(
        "batch_channel_norm", "estimate", lambda c: nk.BatchChannelNorm(c, 2, estimate=True), exact_gradient=False
    ),
    _variant("batch_group_norm", "groups", lambda c: nk.BatchGroupNorm(c, 2, 1, alpha=0.3)),
    _variant("batch_group_norm", "examples", lambda c: nk.BatchGroupNorm(c, 2, 2, alpha=0.3)),
    _variant("batch_renorm", "tight", lambda c: nk.BatchRenorm(c, schedule=RenormSchedule.constant(1.25, 0.5))),
    _variant("conditional_instance_norm", "vector", lambda c: nk.ConditionalNorm(c, features=2), extra=_vectors),
    _variant("divisive_norm", "fields", lambda c: nk.DivisiveNorm(c, Field(1, 3), Field(None, 5))),
    _variant("filter_response_norm", "eps", lambda c: nk.FilterResponseNorm(c, tlu=False, learned_eps=True), rule=None),
    _variant("filter_response_norm", "tlu", nk.FilterResponseNorm, rule=None),
    _variant("ghost_batch_norm", "moments", lambda c: nk.GhostBatchNorm(c, 2, memory="moments")),
    _variant("ghost_batch_norm", "sequential", lambda c: nk.GhostBatchNorm(c, 2, memory="sequential")),
    _variant("global_response_norm", "batch", lambda c: nk.GlobalResponseNorm(c, over="n *", layout="n c *")),
    _variant("heeger_norm", "gain", lambda c: nk.HeegerNorm(c, exponent=1.5, sigma=3.0, gain=5.0)),
    _variant("positional_norm", "biased", lambda c: nk.PositionalNorm(correction=0)),
    _variant("rms_norm", "cast", lambda c: nk.RMSNorm(c, cast="before weight", bias=True)),
    _variant("switchable_norm", "unbiased", lambda c: nk.SwitchableNorm(c, correction=1)),
]
EVERY = [*ACTIVATIONS, *VARIANTS]
# The estimates and the unbiased moments are held to the papers' formulas in the methods' own tests.
WITH_ORACLES = [card for card in VARIANTS if not card.name.endswith(("_estimate", "_unbiased"))]


def of(card: Card) -> str:
    """The method of which it is a form."""
    return next(name for name in sorted(_CARDS, key=len, reverse=True) if card.name.startswith(name))


def _conditioned(suffix: str, mode: str = "row", exact: bool = True, **options: Any) -> Card:
    put = partial(weight_conditioning, mode=mode, **options)
    return _variant("weight_conditioning", suffix, put, exact_gradient=exact)


WEIGHT_FORMS = [
    _variant("weight_norm", "one_length", partial(weight_norm, dim=None)),
    _variant("weight_norm", "inputs", partial(weight_norm, dim=1)),
    _variant("spectral_norm", "exact", partial(spectral_norm, exact=True)),
    _variant("weight_standardization", "outside", partial(weight_standardization, correction=1, guard="outside")),
    _conditioned("path", path="weight"),
    _conditioned("gain", gain=1.5),
    _conditioned("detached", exact=False, gradient="detach"),
    _conditioned("col", "col"),
    _conditioned("unfold", "col", view="unfold"),
    _conditioned("rowcol", "rowcol"),
    _conditioned("simultaneous", "rowcol", order="simultaneous"),
    _conditioned("ruiz", "rowcol", order="ruiz", iterations=3),
]
