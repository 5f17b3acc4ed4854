"""The catalogue: one list, its pictures, its citations."""

import inspect
import io
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from torch import nn

import normkit as nk
from laws import RULES, name
from normkit.catalogue import METHODS, method
from normkit.catalogue.citation import cite, methods_in
from normkit.catalogue.diagram import draw_text, members, small_shape
from normkit.catalogue.drawing import draw, draw_methods
from normkit.catalogue.entry import describe, entries, entry
from normkit.catalogue.page import list_table, show_page
from normkit.core.card import Card
from normkit.core.errors import NotationError
from normkit.core.support import Support


def test_names_and_words_are_unique() -> None:
    names = [card.name for card in METHODS]
    words = [card.word for card in METHODS if card.word]
    assert len(set(names)) == len(names)
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("card", METHODS, ids=name)
def test_every_card_is_whole(card: Card) -> None:
    for field in ("title", "normalized_over", "formula", "use_cases", "strengths", "weaknesses"):
        assert getattr(card, field).strip(), field
    assert card.paper.url.startswith("https://")
    assert 1800 < card.paper.year < 2100
    assert method(card.name) is card
    assert card.functional.__doc__
    assert card.module.__doc__


# "``eps`` and ``affine`` are those of BatchNorm".
LENT = re.compile(r"([^.:;]*) are those of (?:``)?(\w+)")


@pytest.mark.parametrize("module", sorted({card.module.__module__ for card in METHODS}))
def test_arguments_that_a_docstring_takes_from_another_are_in_both_signatures(module: str) -> None:
    known = vars(sys.modules[module])
    for own in [value for value in known.values() if getattr(value, "__module__", "") == module and value.__doc__]:
        for said, other in LENT.findall(" ".join(own.__doc__.split())):
            theirs = getattr(nk, other, known.get(other))
            if not callable(theirs):
                continue
            mine, lent = ({*inspect.signature(one).parameters} for one in (own, theirs))
            assert {*re.findall(r"``(\w+)``", said)} <= mine & lent, (own, other)
            assert "rguments" not in said, (own, other)  # which, would have to be worked out


@pytest.mark.parametrize("card", METHODS, ids=name)
def test_every_page_prints_narrow_and_wide(card: Card) -> None:
    for width in (60, 140):
        out = io.StringIO()
        show_page(card.name, Console(file=out, width=width))
        assert card.title in " ".join(out.getvalue().split())
        if card.rule:
            assert "◆" in out.getvalue()


def test_the_list_names_every_method() -> None:
    out = io.StringIO()
    list_table(Console(file=out, width=160))
    assert all(card.name in out.getvalue() for card in METHODS)


def test_the_entries_are_those_of_the_cards() -> None:
    assert entries() == tuple(map(describe, METHODS)), "run: python -m normkit.catalogue.table docs/methods.md"


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("groupnorm2", "did you mean group_norm or batch_group_norm? "),
        ("layernrom", "did you mean layer_norm or layer_norm_rnn? "),
        ("spectral", "did you mean spectral_norm or spectral_conditioning? "),
        ("weight", "did you mean weight_norm, weight_standardization or scaled_weight_standardization? "),
        ("nosuch", ""),
        ("", ""),
    ],
)
def test_an_unknown_method_names_those_that_are_alike(wrong: str, hint: str) -> None:
    for look_up in (method, entry):
        with pytest.raises(NotationError) as caught:
            look_up(wrong)
        assert str(caught.value).startswith(f"no method {wrong!r}; {hint}those that exist: min_max_scaling, ")


def test_a_method_is_found_by_name_word_and_class() -> None:
    assert method("GroupNorm") is method("gn") is method("group-norm") is method(" Group norm")
    assert entry("GroupNorm") is entry("gn")


@pytest.mark.parametrize("card", RULES, ids=name)
def test_pictures_are_written(card: Card, tmp_path: Path) -> None:
    assert card.rule is not None
    for ending in ("svg", "png"):
        path = draw(card.rule.support, tmp_path / f"{card.name}.{ending}", card.title)
        assert path.stat().st_size > 2000
    texts = [element.text for element in ElementTree.parse(tmp_path / f"{card.name}.svg").iter() if element.text]
    _, labels = small_shape(card.rule.support)
    assert {card.title, *labels} <= set(texts)


def test_support_sets_in_one_picture(tmp_path: Path) -> None:
    names = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "weight_norm")
    (path,) = draw_methods(names, tmp_path, together=True)
    assert path == tmp_path / "support-sets.svg"
    text = path.read_text()
    assert all(method(name).title in text for name in names)
    apart = sum(one.read_text().count("<path") for one in draw_methods(names, tmp_path))
    assert text.count("<path") == apart - (len(names) - 1)  # each file has a background


def test_the_text_picture_counts_what_the_support_says() -> None:
    for support in (Support("n (g c) *", over="c *", g=2), Support("n c *", over="n *"), Support("o i *", over="o *")):
        shape, _ = small_shape(support)
        drawn = draw_text(support)
        assert drawn.count("■") + drawn.count("◆") == members(support, shape).sum() == support.split(shape).count


def test_citations_are_of_what_is_in_the_model() -> None:
    model = nn.Sequential(
        nn.Linear(2, 2),
        nn.BatchNorm1d(2),
        nk.RMSNorm(2),
        nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
        nk.weights.weight_conditioning(nn.Linear(2, 2)),
    )
    names = {"batch_norm", "rms_norm", "spectral_norm", "weight_conditioning"}
    assert {card.name for card in methods_in(model)} == names
    text = cite(model)
    assert text.count("@misc") == 4
    assert cite(nn.Linear(2, 2)) == ""


@pytest.mark.parametrize("torchs", [nn.SyncBatchNorm, nn.InstanceNorm1d, nn.BatchNorm2d], ids=name)
def test_torch_classes_are_found_by_the_nearest_method(torchs) -> None:
    wanted = {"SyncBatchNorm": "sync_batch_norm", "InstanceNorm1d": "instance_norm", "BatchNorm2d": "batch_norm"}
    assert [card.name for card in methods_in(torchs(2))] == [wanted[torchs.__name__]]


# What acts on gradients is no part of a model.
MADE = [card for card in METHODS if card.kind != "gradient" and issubclass(card.module, nn.Module)]


@pytest.mark.parametrize("card", MADE, ids=name)
def test_what_a_card_makes_is_known_as_its_method(card: Card) -> None:
    found = methods_in(card.make(nn.Linear(4, 4)) if card.kind == "weight" else card.make(4))
    assert card.paper in [each.paper for each in found]
    same = [each for each in METHODS if each.module is card.module]
    if len(same) == 1 or any(each.fits for each in same):  # else the class does not say which it is
        assert card in found
