"""A method's card: what it normalizes over, where it was published, when to use it, and the claims that the tests check."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

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
        first, *more = (name.split(",")[0] for name in names)
        who = f"{first} et al." if len(more) > 1 else " and ".join([first, *more])
        return f'{who} {self.year}, "{self.title}", {self.url}'

    def bibtex(self) -> str:
        """A BibTeX entry, keyed by first author, year and first word of the title."""
        key = re.sub(r"\W", "", self.authors.split(",")[0] + str(self.year) + self.title.split()[0]).lower()
        fields = {"author": self.authors, "title": self.title, "year": self.year, "url": self.url}
        return f"@misc{{{key},\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items()) + "}"


@cache
def _bibliography() -> dict[str, Paper]:
    """The papers in references.bib by their keys, where each stands as ``bibtex`` writes it."""
    text = Path(__file__).with_name("references.bib").read_text(encoding="utf-8")
    found = {}
    for key, entry in re.findall(r"@misc\{(\w+),\n(.*?)\n\}", text, re.DOTALL):
        of = dict(re.findall(r"(\w+) = \{(.*)\},", entry))
        found[key] = Paper(of["author"], of["title"], int(of["year"]), of["url"])
    return found


def paper(key: str) -> Paper:
    """The paper of a key in references.bib."""
    return _bibliography()[key]


def _made(*given: Any) -> NoReturn:
    """Stands for what a card makes where it says nothing of it."""
    raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Card:
    """One method of the catalogue. The laws in the tests check every claim on it that a machine can check."""

    # The name in snake case. Default: the function's, of which it differs only where several methods share one.
    name: str = ""
    title: str  # the name in words
    kind: Kind = "activation"  # what is normalized. Default: activations.
    word: str = ""  # the word for the method in recipes; "" for none
    normalized_over: str  # the support set in words
    formula: str = ""  # as the literature writes it. Default: the rule's.
    paper: Paper  # where it was published
    use_cases: str  # where it is the usual choice
    strengths: str  # arguments for it
    weaknesses: str  # arguments against it
    # The class of the layer (activations), data transform (inputs), parametrization (weights) or gradient processor.
    module: type[Any]
    functional: Callable[..., Any]  # the stateless function
    # ``make(channels)`` returns a small module for an input of the rule's layout (activations); ``make(layer)``
    # parametrizes a layer and returns it (weights); ``make(features)`` returns an unfitted module (inputs);
    # ``make(model)`` returns the processor of a model's gradients (gradients). Default: the module, without arguments
    # for inputs.
    make: Callable[..., Any] = _made
    rule: Rule | None = None  # the method as data, or None where it is not one rule
    # The input layout of an activation layer: ``"n c *"`` channels first, or ``"* d"`` features last.
    layout: Literal["n c *", "* d"] = "n c *"
    # For conditioned layers, maps an example of the first input of forward to the others.
    extra: Callable[[Tensor], tuple[Any, ...]] | None = None
    # A sample's training output depends on other samples, as in every layer with running statistics.
    batch_dependent: bool = False
    order_dependent: bool = False  # a sample's training output depends on its position in the batch
    running_state: bool = False  # it keeps running statistics, or (inputs) those that it was fitted on
    # Training and inference compute the same function. Default: unless a layer has running statistics.
    train_equals_eval: bool | None = None
    # The backward pass is the derivative of the training output; False where the method deliberately treats something
    # that depends on the input as a constant.
    exact_gradient: bool = True
    foldable: bool = False  # it can be baked into the weights for inference, as every parametrization of weights
    # The input can be recovered from the output (inputs): where statistics of the data are kept.
    invertible: bool = False
    streams: bool = False  # its statistics can be accumulated batch by batch without approximation (inputs)
    # For a class with several cards, whether an instance is this method; None on the default card.
    fits: Callable[[Any], bool] | None = None
    # Changes of a linear layer's weight or data that leave its normalized output unchanged.
    invariances: frozenset[Invariance] = frozenset()
    # Makes the layer that replaces a norm at a place; None for a method without a word (activations).
    build: Callable[[Place], Any] | None = None
    wordless: str = ""  # reason an activation method has no word
    option: Option | None = None  # the option that may follow the word
    axes: tuple[Axes, ...] = ()  # the input layouts that ``build`` supports. Default: the one of ``layout``.
    # The parameters of the built layer that mean the same as a norm's weight and bias, and are copied from it.
    takes: tuple[str, ...] = ("weight", "bias")
    over: str | None = None  # the axes of ``"n c *"`` that statistics are computed over, where the rule does not say
    accompanies: bool = False  # whether networks use it in addition to a norm, so that converting norms leaves it alone

    def __post_init__(self) -> None:
        keeps = self.kind == "activation" and self.running_state
        fitted = self.kind == "input" and bool(getattr(self.module, "statistics", ()))
        follows = {
            "name": self.name or self.functional.__name__,
            "make": self._plainly if self.make is _made else self.make,
            "formula": self.formula or (self.rule.formula() if self.rule is not None else ""),
            "batch_dependent": self.batch_dependent or keeps,
            "train_equals_eval": not keeps if self.train_equals_eval is None else self.train_equals_eval,
            "running_state": self.running_state or fitted,
            "invertible": self.invertible or fitted,
            "foldable": self.foldable or self.kind == "weight",
            "axes": self.axes or (("n c *",) if self.layout == "n c *" else ("n * c",)),
        }
        for field, value in follows.items():
            object.__setattr__(self, field, value)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise NotationError(f"Card: name {self.name!r}; wanted snake case, as the function is named")
        if self.kind != "activation":
            return
        if bool(self.word) == bool(self.wordless) or bool(self.word) == (self.build is None):
            raise NotationError(f"Card {self.name}: wanted word= and build=, or wordless=, the reason why it has none")

    def _plainly(self, sizes: Any) -> Any:
        return self.module() if self.kind == "input" else self.module(sizes)

    @property
    def words(self) -> str:
        """The word with its option in capitals: ``gn:GROUPS``; the name of a weight method without word; else ""."""
        word = self.word or (self.name if self.kind == "weight" else "")  # recipes take weight methods by name too
        return f"{word}:{self.option.name}" if word and self.option else word

    @property
    def reach(self) -> frozenset[str]:
        """The axes of ``"n c *"`` or ``"* d"`` that statistics are computed over; none where there is no statistic."""
        if self.over is not None or self.rule is None:
            return frozenset((self.over or "").split())
        return frozenset(self.rule.support.reduced)
