"""Normalizations of data, fitted on the training set and kept in a model; one family a file."""
