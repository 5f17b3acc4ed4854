"""The public names of the catalogue. ``normkit.catalogue`` hands them out from here when the first of them is asked for."""

from normkit.catalogue.citation import cite, methods_in
from normkit.catalogue.methods import METHODS, method
from normkit.core.card import Card, Paper

__all__ = ["METHODS", "Card", "Paper", "cite", "method", "methods_in"]
