"""Normalizations of gradients, one method per file."""

from normkit.gradients.grad_norm import Balance, GradNorm
from normkit.gradients.gradient_normalizer import AdaptiveClipping, GradientNormalizer
from normkit.gradients.muon import Muon, matrix_groups, orthogonalize

__all__ = ["AdaptiveClipping", "Balance", "GradNorm", "GradientNormalizer", "Muon", "matrix_groups", "orthogonalize"]
