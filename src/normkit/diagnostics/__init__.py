"""Measurements of a model, which change nothing."""

from normkit.diagnostics.conditioning import condition_number, operator_norm, operator_spectrum, weight_conditions
from normkit.diagnostics.curvature import hessian, hessian_condition, hessian_extremes, smoothness, spectral_density

__all__ = [
    "condition_number",
    "hessian",
    "hessian_condition",
    "hessian_extremes",
    "operator_norm",
    "operator_spectrum",
    "smoothness",
    "spectral_density",
    "weight_conditions",
]
