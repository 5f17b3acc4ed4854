"""Normalizations of weights, one method a file; each is a parametrization and a function on plain tensors."""
