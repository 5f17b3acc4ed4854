"""What every method of the catalogue is held to; a new card is run through all of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normkit import METHODS, Layer, Rule
from normkit.core.card import Card
from normkit.core.errors import BackendError

ACTIVATIONS = [card for card in METHODS if card.kind == "activation"]
# A conditioned layer's weight comes from its other input: the oracle of all rules does not know it.
RULES = [card for card in ACTIVATIONS if card.rule is not None and card.extra is None]
WEIGHTS = [card for card in METHODS if card.kind == "weight"]
INPUTS = [card for card in METHODS if card.kind == "input"]
BACKENDS = ("reference", "closed", "aten", "native", "auto")


def name(value: Any) -> str:
    """How a case is called in a report."""
    return value.name if isinstance(value, Card) else str(value)


def rule_of(card: Card) -> Rule:
    """The card's rule."""
    assert card.rule is not None
    return card.rule


def roundings(card: Card) -> int:
    """How many roundings of the input's size there are from input to output: in a recurrent layer, some for each time step."""
    return 64 if card.name in ("layer_norm_rnn", "layer_norm_lstm", "layer_norm_gru") else 8


def sub_batch(card: Card) -> int:
    """Samples of a sub-batch, for a rule that splits the batch into such, else 1."""
    return dict(card.rule.support.sizes).get("n", 1) if card.rule is not None else 1


def channels_first(card: Card) -> bool:
    """Whether the layer takes (N, C, *) rather than (*, D)."""
    return card.layout == "n c *"


def call(card: Card, made: nn.Module, x: Tensor) -> Tensor:
    """The layer's output, with whatever else it is conditioned on; a recurrent layer also returns its last state."""
    y = made(x, *(card.extra(x) if card.extra else ()))
    return y[0] if isinstance(y, tuple) else y


def sample_input(card: Card, channels: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """A small input of the card's layout: 3 samples, or as many as make 2 sub-batches; 5 positions."""
    x = torch.randn(2 * sub_batch(card) if sub_batch(card) > 1 else 3, channels, 5, dtype=dtype) * 2 + 1
    return x if channels_first(card) else x.transpose(1, 2).contiguous()


def layer(card: Card, channels: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    """The card's layer with parameters that are not all alike."""
    made = card.make(channels).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) + 1)
    return made


def takes(card: Card, backend: str) -> bool:
    """Whether the back end runs the card's layer on its sample input; ``"auto"`` is all there is where none can be chosen."""
    made = layer(card)
    if not isinstance(made, Layer):
        return backend == "auto"
    made.backend = backend
    try:
        call(card, made, sample_input(card))
    except BackendError:
        return False
    return True


def on_back_ends(cards: Iterable[Card] = ACTIVATIONS) -> list[tuple[Card, str]]:
    """Each activation on each back end that runs it; what "auto" would choose is one of them."""
    return [
        (card, backend)
        for card in cards
        for backend in BACKENDS
        if takes(card, backend) and not (backend == "auto" and takes(card, "reference"))
    ]


def runs(card: Card, made: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The layer's training output on each back end that takes it; the reference always does.

    A layer that is not one rule has no choice of back ends, and is run once.
    """
    if not isinstance(made, Layer):
        start = copy.deepcopy(made.state_dict())
        yield "auto", call(card, made, x)
        made.load_state_dict(start)
        return
    start = {key: value.clone() for key, value in made.state_dict().items()}
    for backend in BACKENDS:
        made.backend = backend
        made.load_state_dict(start)
        try:
            yield backend, call(card, made, x)
        except BackendError:
            assert backend in ("closed", "aten", "native")
    made.load_state_dict(start)
    made.backend = "auto"
