"""The one list of methods, and what is drawn and printed from it."""

from normkit.catalogue.methods import METHODS, method

__all__ = ["METHODS", "method"]
