"""Demonstrations of a lecture on normalization as experiments, each with a table and a figure."""
