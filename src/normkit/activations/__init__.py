"""Normalizations of activations, one family a file."""
