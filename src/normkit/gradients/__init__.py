"""Normalizations of gradients, one method a file."""
