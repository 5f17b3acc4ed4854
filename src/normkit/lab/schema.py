"""What the values of a record must be, and where one is not: a record may come from another version, disk or hand.

>>> run = fields(rate=NUMBER, score=maybe(NUMBER))
>>> run({"rate": "0.1", "score": None}, "run")
"run.rate is '0.1'; wanted a finite number"
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

# Says what is wrong with a value at a place, or None where it is as it must be.
Kind = Callable[[Any, str], str | None]
LARGEST = 1e300  # finite, and so are the sums of many


def kind(name: str, good: Callable[[Any], bool]) -> Kind:
    """A kind of values."""

    def look(value: Any, place: str) -> str | None:
        return None if good(value) else f"{place or 'it'} is {_shown(value)}; wanted {name}"

    return look


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST


ANY: Kind = kind("any value", lambda value: True)
NUMBER: Kind = kind("a finite number", _is_number)
POSITIVE: Kind = kind("a number above 0", lambda value: _is_number(value) and value > 0)
COUNT: Kind = kind("a whole number from 0", lambda value: type(value) is int and 0 <= value < 2**63)
TEXT: Kind = kind("printable text", lambda value: isinstance(value, str) and value.isprintable())
FLAG: Kind = kind("true or false", lambda value: isinstance(value, bool))
OBJECT: Kind = kind("an object", lambda value: isinstance(value, dict))


def maybe(of: Kind) -> Kind:
    """A value or null."""
    return lambda value, place: None if value is None else of(value, place)


class _Optional:
    def __init__(self, of: Kind) -> None:
        self.of = of

    def __call__(self, value: Any, place: str) -> str | None:
        return self.of(value, place)


def optional(of: Kind) -> Kind:
    """A field that a record need not have."""
    return _Optional(of)


def one_of(*words: str) -> Kind:
    """One of some words."""
    return kind(" or ".join(words), lambda value: isinstance(value, str) and value in words)


def each(of: Kind, least: int = 0, count: int | None = None) -> Kind:
    """A list."""

    def look(value: Any, place: str) -> str | None:
        if not isinstance(value, list) or len(value) < least or count not in (None, len(value)):
            wanted = f"a list of {count}" if count is not None else f"a list of {least} or more" if least else "a list"
            return f"{place or 'it'} is {_shown(value)}; wanted {wanted}"
        return _first(of, enumerate(value), place)

    return look


def named(of: Kind) -> Kind:
    """An object whose values are all of one kind."""
    return lambda value, place: OBJECT(value, place) or _first(of, value.items(), place)


def fields(**wanted: Kind) -> Kind:
    """An object that has some keys at least."""

    def look(value: Any, place: str) -> str | None:
        if fault := OBJECT(value, place):
            return fault
        for key, of in wanted.items():
            where = _join(place, key)
            if key not in value:
                if isinstance(of, _Optional):
                    continue
                return f"{where} is not in it"
            if fault := of(value[key], where):
                return fault
        return None

    return look


def version(number: int, of: Kind) -> Kind:
    """An object of a schema's number, which is looked at before all else in it."""

    def look(value: Any, place: str) -> str | None:
        if isinstance(value, dict) and value.get("schema", number) != number:
            return f"it is of schema {_shown(value['schema'])}, this normkit reads schema {number}"
        return fields(schema=COUNT)(value, place) or of(value, place)

    return look


def parse(text: str | bytes) -> Any:
    """Reads JSON that says each key once and holds no NaN."""
    return json.loads(text, parse_constant=_constant, object_pairs_hook=_object)


def _constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not know")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("it says a key twice")
    return made


def _first(of: Kind, entries: Any, place: str) -> str | None:
    return next((fault for key, value in entries if (fault := of(value, _join(place, key)))), None)


def _join(place: str, key: Any) -> str:
    name = str(key)
    name = name if name.isprintable() else repr(name)
    return f"{place}.{name}" if place else name


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping | list):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    text = repr(value) if isinstance(value, str | float) or abs(value) < LARGEST else "beyond all bounds"
    return text if len(text) <= 60 else f"{text[:57]}..."
