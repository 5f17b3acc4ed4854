"""A method's card: what it normalizes over, whose it is, when to use it, and what is claimed of it and so tested."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from normkit.core.errors import NotationError
from normkit.core.place import Axes, Option, Place
from normkit.core.rule import Rule

Kind = Literal["input", "activation", "weight", "gradient"]
Invariance = Literal["weight scale", "weight shift", "row scale", "data scale", "data shift", "sample scale"]


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    authors: str
    title: str
    year: int
    url: str

    def cite(self) -> str:
        """One line: first author, year, title, address."""
        names = self.authors.split(" and ")
        who = names[0].split(",")[0] + (
            " et al." if len(names) > 2 else f" and {names[1].split(',')[0]}" if len(names) == 2 else ""
        )
        return f'{who} {self.year}, "{self.title}", {self.url}'

    def bibtex(self) -> str:
        """A BibTeX entry, keyed by first author, year and first word of the title."""
        key = re.sub(r"\W", "", self.authors.split(",")[0] + str(self.year) + self.title.split()[0]).lower()
        fields = {"author": self.authors, "title": self.title, "year": self.year, "url": self.url}
        return f"@misc{{{key},\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items()) + "}"


@dataclass(frozen=True)
class Card:
    """One method of the catalogue. Every claim on it that a machine can check is checked by the laws in the tests.

    Args:
        name: in snake case, as the function is named.
        title: in words.
        kind: what is normalized.
        word: the method's word in recipes, or "".
        normalized_over: the support set in words.
        formula: as the literature writes it.
        paper: where it was published.
        use_cases: where it is the usual choice.
        strengths: what speaks for it.
        weaknesses: what speaks against it.
        module: the class (activations, inputs), the parametrization (weights) or what acts on gradients, a module or not.
        functional: the stateless function.
        make: ``make(channels)`` gives a small module for an input of the rule's layout (activations); ``make(layer)`` puts the
            method on a layer and returns it (weights); ``make(features)`` gives a module that is not fitted yet (inputs);
            ``make(model)`` gives what acts on the gradients of a model (gradients).
        rule: the method as data, or None where it is not one rule.
        layout: what an activation layer takes: ``"n c *"`` channels first, or ``"* d"`` features last.
        extra: the other inputs of forward, given an example of the first; for layers that are conditioned on something.
        batch_dependent: a sample's training output depends on other samples.
        order_dependent: a sample's training output depends on where in the batch it stands.
        running_state: it keeps running statistics.
        train_equals_eval: training and inference compute the same function.
        exact_gradient: the backward pass is the derivative of the training output; False where the method holds something
            constant on purpose that depends on the input.
        foldable: it can be baked into the weights for inference.
        invertible: the input can be recovered from the output (inputs).
        streams: its statistics can be measured batch by batch, exactly (inputs).
        fits: of a class with several cards, whether an instance of it is this method; None for what is left.
        invariances: changes of a linear layer's weight or data that leave the layer's normalized output as it was.
        build: the layer for a place where a norm stood; None for a method that has no word (activations).
        wordless: why an activation method has no word.
        option: what may follow the word.
        axes: the inputs for which ``build`` has a layer. Default: the one of ``layout``.
        takes: the parameters of the built layer that mean what a norm's weight and bias mean, and so are handed over.
        over: the axes of ``"n c *"`` that statistics reach over in training or at inference, where the rule does not tell.
        accompanies: whether it stands next to a norm in the networks it comes from, so that it is never converted itself.
    """

    name: str
    title: str
    kind: Kind
    word: str
    normalized_over: str
    formula: str
    paper: Paper
    use_cases: str
    strengths: str
    weaknesses: str
    module: type[Any]
    functional: Callable[..., Any]
    make: Callable[..., Any]
    rule: Rule | None = None
    layout: Literal["n c *", "* d"] = "n c *"
    extra: Callable[[Tensor], tuple[Any, ...]] | None = None
    batch_dependent: bool = False
    order_dependent: bool = False
    running_state: bool = False
    train_equals_eval: bool = True
    exact_gradient: bool = True
    foldable: bool = False
    invertible: bool = False
    streams: bool = False
    fits: Callable[[Any], bool] | None = None
    invariances: frozenset[Invariance] = frozenset()
    build: Callable[[Place], Any] | None = None
    wordless: str = ""
    option: Option | None = None
    axes: tuple[Axes, ...] = ()
    takes: tuple[str, ...] = ("weight", "bias")
    over: str | None = None
    accompanies: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise NotationError(f"Card: name {self.name!r}; wanted snake case, as the function is named")
        if self.kind != "activation":
            return
        if bool(self.word) == bool(self.wordless) or bool(self.word) == (self.build is None):
            raise NotationError(
                f"Card {self.name}: wanted a word for recipes with build=, or wordless= with the reason why it has none"
            )
        if not self.axes:
            object.__setattr__(self, "axes", ("n c *",) if self.layout == "n c *" else ("n * c",))

    @property
    def words(self) -> str:
        """How the method is written in recipes, with its option in capitals: ``gn:GROUPS``; "" where it has no word."""
        return f"{self.word}:{self.option.name}" if self.word and self.option else self.word

    @property
    def reach(self) -> frozenset[str]:
        """The axes of ``"n c *"`` or ``"* d"`` that statistics reach over; none where there is no statistic."""
        if self.over is not None or self.rule is None:
            return frozenset((self.over or "").split())
        return frozenset(self.rule.support.reduced)
