"""Normalizations of gradients, one method per file."""

from normkit.gradients.adaptive_clipping import AdaptiveClipping
from normkit.gradients.grad_norm import Balance, GradNorm
from normkit.gradients.gradient_normalizer import GradientNormalizer

__all__ = [
    "AdaptiveClipping",
    "Balance",
    "GradNorm",
    "GradientNormalizer",
]
