"""Measurements of a model, which change nothing unless asked to."""

from normkit.diagnostics.activations import activations
from normkit.diagnostics.audit.checks import audit
from normkit.diagnostics.audit.finding import Audit, Finding
from normkit.diagnostics.conditioning import (
    condition_number,
    conditions,
    operator_norm,
    operator_spectrum,
    weight_conditions,
)
from normkit.diagnostics.curvature import hessian, hessian_condition, hessian_extremes, smoothness, spectral_density
from normkit.diagnostics.gap import gap

__all__ = [
    "Audit",
    "Finding",
    "activations",
    "audit",
    "condition_number",
    "conditions",
    "gap",
    "hessian",
    "hessian_condition",
    "hessian_extremes",
    "operator_norm",
    "operator_spectrum",
    "smoothness",
    "spectral_density",
    "weight_conditions",
]
