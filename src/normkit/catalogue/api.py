"""The public names of the catalogue. ``normkit.catalogue`` loads them from here when the first is requested."""

from normkit.catalogue.citation import cite, methods_in
from normkit.catalogue.methods import METHODS, method
from normkit.core.card import Card, Paper

__all__ = ["METHODS", "Card", "Paper", "cite", "method", "methods_in"]
