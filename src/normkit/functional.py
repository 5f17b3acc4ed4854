"""Every method as a function that keeps nothing between calls, with the types that these functions take and return.

Where ``torch.nn.functional`` has the norm, its argument names and defaults are torch's, so that a model's calls work with
``from normkit import functional as F``. Functions of data take it first, as ``input``.
"""

from normkit.activations.adaptive_layer_norm import adaptive_layer_norm, film, modulate
from normkit.activations.batch_channel_norm import batch_channel_norm, est_batch_norm
from normkit.activations.batch_group_norm import batch_group_norm, example_weighing
from normkit.activations.batch_norm import batch_norm, mean_only_batch_norm
from normkit.activations.batch_renorm import RenormSchedule, batch_renorm
from normkit.activations.conditional_norm import conditional_norm
from normkit.activations.conditioned_tokens import conditioned_tokens
from normkit.activations.divisive_norm import Field, divisive_norm, heeger_norm, lyu_simoncelli_norm
from normkit.activations.dynamic_tanh import dynamic_erf, dynamic_tanh
from normkit.activations.gated_rms_norm import gated_rms_norm, seed_norm
from normkit.activations.gdn import gdn
from normkit.activations.ghost_batch_norm import ghost_batch_norm
from normkit.activations.global_response_norm import filter_response_norm, global_response_norm
from normkit.activations.group_norm import group_norm, local_context_norm
from normkit.activations.hypersphere import hypersphere, hypersphere_residual, renormalize_
from normkit.activations.instance_norm import adaptive_instance_norm, instance_norm
from normkit.activations.layer_norm import PositionalMoments, layer_norm, positional_moments, positional_norm
from normkit.activations.local_response_norm import local_contrast_norm, local_response_norm
from normkit.activations.normalizer_free import scaled_activation
from normkit.activations.query_key_norm import preconditioned_attention, query_key_norm
from normkit.activations.recurrent_batch_norm import padding_mask, recurrent_batch_norm
from normkit.activations.recurrent_layer_norm import unroll
from normkit.activations.rms_norm import partial_rms_norm, rms_norm
from normkit.activations.scale_norm import fix_norm, holo_norm, scale_norm
from normkit.activations.switchable_norm import exemplar_norm, switchable_norm
from normkit.activations.sync_batch_norm import sync_batch_norm
from normkit.core.memory import RunningMoments, RunningStatistics
from normkit.core.moments import moments
from normkit.engine.dispatch import Explanation, run
from normkit.gradients.grad_norm import grad_norm
from normkit.gradients.gradient_normalizer import adaptive_gradient_clipping, normalize_gradients
from normkit.gradients.muon import muon_eq
from normkit.preprocessing.feature_scaling import (
    max_abs_scaling,
    mean_normalization,
    min_max_scaling,
    robust_scaling,
    z_score,
)
from normkit.preprocessing.image_standardization import image_standardization
from normkit.preprocessing.sample_scaling import global_contrast, unit_length
from normkit.preprocessing.whitening import whitening
from normkit.weights.preconditioning import add_identity, preconditioned
from normkit.weights.spectral_norm import divide_by_sigma
from normkit.weights.weight_conditioning import equilibrate
from normkit.weights.weight_norm import rescale
from normkit.weights.weight_standardization import standardize, standardize_scaled

__all__ = [
    "Explanation",
    "Field",
    "PositionalMoments",
    "RenormSchedule",
    "RunningMoments",
    "RunningStatistics",
    "adaptive_gradient_clipping",
    "adaptive_instance_norm",
    "adaptive_layer_norm",
    "add_identity",
    "batch_channel_norm",
    "batch_group_norm",
    "batch_norm",
    "batch_renorm",
    "conditional_norm",
    "conditioned_tokens",
    "divide_by_sigma",
    "divisive_norm",
    "dynamic_erf",
    "dynamic_tanh",
    "equilibrate",
    "est_batch_norm",
    "example_weighing",
    "exemplar_norm",
    "film",
    "filter_response_norm",
    "fix_norm",
    "gated_rms_norm",
    "gdn",
    "ghost_batch_norm",
    "global_contrast",
    "global_response_norm",
    "grad_norm",
    "group_norm",
    "heeger_norm",
    "holo_norm",
    "hypersphere",
    "hypersphere_residual",
    "image_standardization",
    "instance_norm",
    "layer_norm",
    "local_context_norm",
    "local_contrast_norm",
    "local_response_norm",
    "lyu_simoncelli_norm",
    "max_abs_scaling",
    "mean_normalization",
    "mean_only_batch_norm",
    "min_max_scaling",
    "modulate",
    "moments",
    "muon_eq",
    "normalize_gradients",
    "padding_mask",
    "partial_rms_norm",
    "positional_moments",
    "positional_norm",
    "preconditioned",
    "preconditioned_attention",
    "query_key_norm",
    "recurrent_batch_norm",
    "renormalize_",
    "rescale",
    "rms_norm",
    "robust_scaling",
    "run",
    "scale_norm",
    "scaled_activation",
    "seed_norm",
    "standardize",
    "standardize_scaled",
    "switchable_norm",
    "sync_batch_norm",
    "unit_length",
    "unroll",
    "whitening",
    "z_score",
]
