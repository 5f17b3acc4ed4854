"""Measurements of a model, which change nothing."""

from normkit.diagnostics.conditioning import condition_number, operator_norm, operator_spectrum, weight_conditions

__all__ = [
    "condition_number",
    "operator_norm",
    "operator_spectrum",
    "weight_conditions",
]
