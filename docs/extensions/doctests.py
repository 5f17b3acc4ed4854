"""Shows doctests as code in the reference, where they stand without a heading of their own."""

import re
from typing import Any

import griffe

# A prompt and all that follows it up to an empty line, at one indentation.
_DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +.*)*", re.MULTILINE)


class FenceDoctests(griffe.Extension):
    """Puts a fence around each doctest before the docstring is parsed; leaves out what pages say in their own words."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.path == "normkit.api":
            obj.docstring = None  # the pages show it in parts, under headings
        elif obj.docstring:
            obj.docstring.value = _DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
