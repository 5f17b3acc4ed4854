"""Normalizations of weights, one method per file; each is a parametrization and a function on plain tensors."""

from normkit.weights.layout import WeightLayout, weight_layout
from normkit.weights.preconditioning import (
    Precondition,
    SpectralConditioning,
    inverse_root_diagonal,
    inverse_root_rows,
    precondition,
    spectral_conditioning,
)
from normkit.weights.spectral_norm import SpectralNorm, power_iteration, spectral_norm
from normkit.weights.weight_conditioning import Equilibrate, Temperature, weight_conditioning
from normkit.weights.weight_norm import WeightNorm, weight_norm
from normkit.weights.weight_standardization import (
    ScaledWeightStandardization,
    WeightStandardization,
    nonlinearity_gain,
    scaled_weight_standardization,
    weight_standardization,
)

__all__ = [
    "Equilibrate",
    "Precondition",
    "ScaledWeightStandardization",
    "SpectralConditioning",
    "SpectralNorm",
    "Temperature",
    "WeightLayout",
    "WeightNorm",
    "WeightStandardization",
    "inverse_root_diagonal",
    "inverse_root_rows",
    "nonlinearity_gain",
    "power_iteration",
    "precondition",
    "scaled_weight_standardization",
    "spectral_conditioning",
    "spectral_norm",
    "weight_conditioning",
    "weight_layout",
    "weight_norm",
    "weight_standardization",
]
