"""Shows doctests as code in the reference, where they stand without a heading of their own."""

import re
from typing import Any

import griffe

# A prompt and all that follows it up to an empty line, at one indentation.
_DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +.*)*", re.MULTILINE)


class FenceDoctests(griffe.Extension):
    """Puts a fence around each doctest before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
