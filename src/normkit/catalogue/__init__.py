"""The list of methods, and what is drawn and printed from it."""

from typing import TYPE_CHECKING

from normkit.lazy import lazily

# The list imports every method and so torch; the entries next to it are read without torch.
if TYPE_CHECKING:
    from normkit.catalogue.api import *  # noqa: F403
else:
    __getattr__, __dir__ = lazily(__name__, "normkit.catalogue.api")
