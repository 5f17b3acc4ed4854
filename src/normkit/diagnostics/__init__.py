"""Measurements of a model: they change nothing."""
