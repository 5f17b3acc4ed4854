"""Tables in the terminal, as wide as it is and in the letters that it can write, and in Markdown."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Grid
from rich.text import Text

from normkit.lab.experiment import Table
from normkit.lab.say import visible
from normkit.lab.stats import ABSENT, BETTER, WORSE

COLOURS = {BETTER: "green", WORSE: "red", "diverged": "red"}
ASCII = str.maketrans({"\u2212": "-", ABSENT: "-", "\u00d7": "x", "±": "+-", "†": "*", "²": "2", "κ": "k", "λ": "l"})
LONG = 24  # characters, from which on a cell is read like a sentence
GAP = 2  # on each side of the line between two columns of a terminal
ENDLESS = 10**6


def cell(value: Any) -> str:
    """A cell of a table as text: up to four significant digits."""
    if value is None:
        return ABSENT
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spelled(text: str, console: Console, style: str = "") -> Text:
    """Text in the letters that the terminal can write; some pipes and Windows consoles have no UTF-8."""
    text = visible(text)
    return Text(text.translate(ASCII) if console.options.ascii_only else text, style=style, overflow="fold")


def print_text(text: str, console: Console, style: str = "") -> None:
    """Prints a paragraph, broken between words."""
    console.print(spelled(text, console, style))


def markdown(table: Table) -> str:
    r"""A table in Markdown, without title and notes.

    >>> print(markdown(Table("", ["recipe", "score"], [["bn|e", 0.5]])))
    | recipe | score |
    | --- | ---: |
    | bn\|e | 0.5 |
    """
    head, *rows = [
        [cell(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in (table.columns, *table.rows)
    ]
    rule = ["---" if not place or is_text(table, place) else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows])


def print_table(table: Table, console: Console) -> None:
    """Prints a table with its title and notes."""
    print_text(f"\n{table.title}", console, "bold")
    for places in side_by_side(table, console):
        console.print(_roomy(table, places, console))
    for note in table.notes:
        print_text(note, console, "dim")


def side_by_side(table: Table, console: Console) -> list[list[int]]:
    """Parts the columns of a table so that each part fits a console, with the first column in each."""
    parts: list[list[int]] = [[0]]
    for place in range(1, len(table.columns)):
        if len(parts[-1]) > 1 and not _fits(table, [*parts[-1], place], console):
            parts.append([0])
        parts[-1].append(place)
    return parts


def is_text(table: Table, place: int) -> bool:
    """Tells whether a column holds words: most cells are long, have three words or more, or have letters and no digit."""
    cells = [row[place] for row in table.rows if row[place] is not None]
    return 2 * sum(isinstance(value, str) and _wordy(value) for value in cells) > len(cells)


def _wordy(text: str) -> bool:
    letters = any(map(str.isalpha, text)) and not any(map(str.isdigit, text))
    return letters or len(text) > LONG or sum(word.strip(",:").isalpha() for word in text.split()) > 2


def _fits(table: Table, places: Sequence[int], console: Console, room: int = 0) -> bool:
    # Measured without an edge, at which rich would stop.
    endless = console.options.update_width(ENDLESS)
    return Measurement.get(console, endless, _grid(table, places, console, room)).maximum <= console.width


def _roomy(table: Table, places: Sequence[int], console: Console) -> Grid:
    # Where headings must be broken, the widest columns give way first.
    room = bisect_left(range(console.width), True, key=lambda room: not _fits(table, places, console, room))
    return _grid(table, places, console, room - 1)


def _grid(table: Table, places: Sequence[int], console: Console, room: int) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place in places:
        justify = "right" if place and not is_text(table, place) else "left"
        width = max(_need(table, place, console), room)
        grid.add_column(
            spelled(table.columns[place], console, "bold"), justify=justify, overflow="fold", max_width=width
        )
    for row in table.rows:
        texts = [cell(row[place]) for place in places]
        grid.add_row(*(spelled(text, console, COLOURS.get(text, "") if k else "bold") for k, text in enumerate(texts)))
    return grid


def _need(table: Table, place: int, console: Console) -> int:
    # A heading may be broken between words; what stands below it only where two columns would not fit.
    texts = [line for row in table.rows for line in cell(row[place]).split("\n")] + table.columns[place].split()
    return max(1, min(max(map(cell_len, texts), default=0), console.width // 2 - GAP))
