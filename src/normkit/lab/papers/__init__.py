"""Experiments of papers, one a file; each ends with its EXPERIMENT."""
