"""Measurements of a model, which change nothing."""

from normkit.diagnostics.audit.checks import audit
from normkit.diagnostics.audit.finding import Audit, Finding
from normkit.diagnostics.conditioning import condition_number, operator_norm, operator_spectrum, weight_conditions

__all__ = [
    "Audit",
    "Finding",
    "audit",
    "condition_number",
    "operator_norm",
    "operator_spectrum",
    "weight_conditions",
]
