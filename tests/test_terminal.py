"""Tables in a terminal of any width, and looks by which recipes are told apart."""

import io
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from normkit.lab.experiment import Table
from normkit.lab.report.drawing import styles
from normkit.lab.report.sheet import cell, print_table, side_by_side


def printed(table: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(table, console)
    return console.export_text()


def test_a_wide_table_is_parted_for_a_narrow_terminal() -> None:
    table = Table("T", ["name", "one two three", "b", "c"], [["row", "1", "2" * 12, "3"]])
    assert side_by_side(table, Console(width=80)) == [[0, 1, 2, 3]]
    assert side_by_side(table, Console(width=30)) == [[0, 1, 2], [0, 3]]
    assert side_by_side(table, Console(width=5)) == [[0, 1], [0, 2], [0, 3]]
    assert "one two three" in printed(table, 80)
    assert "2" * 12 in printed(table, 30)


WORDS = st.lists(st.text("abcdef", min_size=1, max_size=14), min_size=1, max_size=5).map(" ".join)
CELLS = st.one_of(st.none(), st.floats(allow_nan=False), st.integers(), WORDS, st.just("[bold]"))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(*[st.lists(each, min_size=n, max_size=n) for each in (WORDS, CELLS)])
    )
)
def test_a_terminal_of_80_columns_shows_all_cells_and_headings(drawn: tuple[list[str], list[Any]]) -> None:
    columns, row = drawn
    shown = printed(Table("T", columns, [row, row[::-1]]), 80)
    for text in (*columns, *map(cell, row)):
        for word in text.split():
            assert word in shown


def test_many_recipes_are_told_apart() -> None:
    looks = styles([str(index) for index in range(20)], "0")
    assert len({(look.light, look.marker, look.line) for look in looks}) == 20
