"""Every public name. ``normkit`` hands them out from here when the first of them is asked for."""

from normkit.activations.adaptive_instance_norm import AdaptiveInstanceNorm, adaptive_instance_norm
from normkit.activations.adaptive_layer_norm import (
    AdaLayerNorm,
    AdaLayerNormOutput,
    AdaLayerNormZeroBlock,
    adaptive_layer_norm,
    modulate,
)
from normkit.activations.batch_channel_norm import BatchChannelNorm, EstBatchNorm, batch_channel_norm, est_batch_norm
from normkit.activations.batch_group_norm import BatchGroupNorm, batch_group_norm, example_weighing
from normkit.activations.batch_norm import BatchNorm, batch_norm
from normkit.activations.batch_renorm import BatchRenorm, RenormSchedule, batch_renorm
from normkit.activations.conditional_norm import ConditionalNorm, SpatiallyAdaptiveNorm, conditional_norm
from normkit.activations.divisive_norm import (
    DivisiveNorm,
    Field,
    HeegerNorm,
    LyuSimoncelliNorm,
    divisive_norm,
    heeger_norm,
    lyu_simoncelli_norm,
)
from normkit.activations.dynamic_tanh import DynamicTanh, dynamic_tanh
from normkit.activations.exemplar_norm import ExemplarNorm, exemplar_norm
from normkit.activations.film import FiLM, film
from normkit.activations.filter_response_norm import FilterResponseNorm, filter_response_norm
from normkit.activations.fix_norm import FixNorm, fix_norm
from normkit.activations.gdn import GDN, gdn
from normkit.activations.ghost_batch_norm import GhostBatchNorm, ghost_batch_norm
from normkit.activations.global_response_norm import GlobalResponseNorm, global_response_norm
from normkit.activations.group_norm import GroupNorm, group_norm
from normkit.activations.hypersphere import (
    HypersphereResidual,
    LearnedScale,
    hypersphere,
    hypersphere_residual,
    renormalize_,
)
from normkit.activations.instance_norm import InstanceNorm, instance_norm
from normkit.activations.layer_norm import LayerNorm, layer_norm
from normkit.activations.local_context_norm import LocalContextNorm, local_context_norm
from normkit.activations.local_contrast_norm import LocalContrastNorm, local_contrast_norm
from normkit.activations.local_response_norm import LocalResponseNorm, local_response_norm
from normkit.activations.mean_only_batch_norm import MeanOnlyBatchNorm, mean_only_batch_norm
from normkit.activations.normalizer_free import NormalizerFreeBlock, scaled_activation
from normkit.activations.partial_rms_norm import PartialRMSNorm, partial_rms_norm
from normkit.activations.positional_norm import (
    PositionalMoments,
    PositionalNorm,
    positional_moments,
    positional_norm,
)
from normkit.activations.query_key_norm import QueryKeyNorm, query_key_norm
from normkit.activations.recurrent_batch_norm import (
    BatchNormLSTM,
    BatchNormRNN,
    RecurrentBatchNorm,
    padding_mask,
    recurrent_batch_norm,
)
from normkit.activations.recurrent_layer_norm import (
    LayerNormGRUCell,
    LayerNormLSTMCell,
    LayerNormRecurrent,
    LayerNormRNNCell,
    unroll,
)
from normkit.activations.rms_norm import RMSNorm, rms_norm
from normkit.activations.scale_norm import ScaleNorm, scale_norm
from normkit.activations.switchable_norm import SwitchableNorm, switchable_norm
from normkit.activations.sync_batch_norm import SyncBatchNorm, sync_batch_norm
from normkit.catalogue.citation import cite, methods_in
from normkit.catalogue.methods import METHODS, method
from normkit.core.card import Card, Paper
from normkit.core.compensation import Affine
from normkit.core.errors import (
    BackendError,
    NormkitError,
    NotationError,
    OptionError,
    ProtocolError,
    RecordError,
    ShapeError,
    SurgeryError,
)
from normkit.core.memory import Running, RunningMoments, RunningStatistics
from normkit.core.moments import Moments, moments
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.diagnostics.conditioning import condition_number, operator_norm, operator_spectrum, weight_conditions
from normkit.engine.dispatch import Explanation, explain, normalize, run
from normkit.engine.layer import Layer
from normkit.gradients.adaptive_clipping import AdaptiveClipping, adaptive_gradient_clipping
from normkit.gradients.grad_norm import GradNorm, grad_norm
from normkit.gradients.gradient_normalizer import GradientNormalizer, normalize_gradients
from normkit.inputs.feature_scaling import (
    MaxAbsScaling,
    MeanNormalization,
    MinMaxScaling,
    ZScore,
    max_abs_scaling,
    mean_normalization,
    min_max_scaling,
    z_score,
)
from normkit.inputs.image_standardization import ImageStandardization, image_standardization
from normkit.inputs.robust_scaling import RobustScaling, robust_scaling
from normkit.inputs.sample_scaling import GlobalContrast, UnitLength, global_contrast, unit_length
from normkit.inputs.whitening import Whitening, whitening
from normkit.residual import Residual
from normkit.schedules import inverse_sqrt_warmup, linear_warmup
from normkit.surgery.accelerate import accelerate
from normkit.surgery.changes import Change, Changes
from normkit.surgery.condition import condition
from normkit.surgery.convert import convert
from normkit.surgery.data_dependent_init import data_dependent_init
from normkit.surgery.decay import FromOne, norm_penalty, param_groups
from normkit.surgery.example_weighing import choose_alpha, weigh_examples
from normkit.surgery.fold import fold
from normkit.surgery.reassign_spectral import reassign_spectral_
from normkit.surgery.recalibrate import recalibrate
from normkit.surgery.recipe import Recipe, apply_recipe
from normkit.surgery.redundant_bias import drop_redundant_bias
from normkit.surgery.select import select
from normkit.weights.layout import WeightLayout, weight_layout
from normkit.weights.power_iteration import power_iteration
from normkit.weights.scaled_weight_standardization import (
    ScaledWeightStandardization,
    nonlinearity_gain,
    scaled_weight_standardization,
    standardize_scaled,
)
from normkit.weights.spectral_norm import SpectralNorm, divide_by_sigma, spectral_norm
from normkit.weights.weight_conditioning import Equilibrate, equilibrate, weight_conditioning
from normkit.weights.weight_norm import WeightNorm, rescale, weight_norm
from normkit.weights.weight_standardization import WeightStandardization, standardize, weight_standardization

__all__ = [
    "GDN",
    "METHODS",
    "AdaLayerNorm",
    "AdaLayerNormOutput",
    "AdaLayerNormZeroBlock",
    "AdaptiveClipping",
    "AdaptiveInstanceNorm",
    "Affine",
    "BackendError",
    "BatchChannelNorm",
    "BatchGroupNorm",
    "BatchNorm",
    "BatchNormLSTM",
    "BatchNormRNN",
    "BatchRenorm",
    "Card",
    "Change",
    "Changes",
    "ConditionalNorm",
    "DivisiveNorm",
    "DynamicTanh",
    "Equilibrate",
    "EstBatchNorm",
    "ExemplarNorm",
    "Explanation",
    "FiLM",
    "Field",
    "FilterResponseNorm",
    "FixNorm",
    "FromOne",
    "GhostBatchNorm",
    "GlobalContrast",
    "GlobalResponseNorm",
    "GradNorm",
    "GradientNormalizer",
    "GroupNorm",
    "HeegerNorm",
    "HypersphereResidual",
    "ImageStandardization",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "LayerNormRNNCell",
    "LayerNormRecurrent",
    "LearnedScale",
    "LocalContextNorm",
    "LocalContrastNorm",
    "LocalResponseNorm",
    "LyuSimoncelliNorm",
    "MaxAbsScaling",
    "MeanNormalization",
    "MeanOnlyBatchNorm",
    "MinMaxScaling",
    "Moments",
    "NormalizerFreeBlock",
    "NormkitError",
    "NotationError",
    "OptionError",
    "Paper",
    "PartialRMSNorm",
    "PositionalMoments",
    "PositionalNorm",
    "ProtocolError",
    "QueryKeyNorm",
    "RMSNorm",
    "Recipe",
    "RecordError",
    "RecurrentBatchNorm",
    "RenormSchedule",
    "Residual",
    "RobustScaling",
    "Rule",
    "Running",
    "RunningMoments",
    "RunningStatistics",
    "ScaleNorm",
    "ScaledWeightStandardization",
    "ShapeError",
    "SpatiallyAdaptiveNorm",
    "SpectralNorm",
    "Statistic",
    "Support",
    "SurgeryError",
    "SwitchableNorm",
    "SyncBatchNorm",
    "UnitLength",
    "WeightLayout",
    "WeightNorm",
    "WeightStandardization",
    "Whitening",
    "ZScore",
    "accelerate",
    "adaptive_gradient_clipping",
    "adaptive_instance_norm",
    "adaptive_layer_norm",
    "apply_recipe",
    "batch_channel_norm",
    "batch_group_norm",
    "batch_norm",
    "batch_renorm",
    "choose_alpha",
    "cite",
    "condition",
    "condition_number",
    "conditional_norm",
    "convert",
    "data_dependent_init",
    "divide_by_sigma",
    "divisive_norm",
    "drop_redundant_bias",
    "dynamic_tanh",
    "equilibrate",
    "est_batch_norm",
    "example_weighing",
    "exemplar_norm",
    "explain",
    "film",
    "filter_response_norm",
    "fix_norm",
    "fold",
    "gdn",
    "ghost_batch_norm",
    "global_contrast",
    "global_response_norm",
    "grad_norm",
    "group_norm",
    "heeger_norm",
    "hypersphere",
    "hypersphere_residual",
    "image_standardization",
    "instance_norm",
    "inverse_sqrt_warmup",
    "layer_norm",
    "linear_warmup",
    "local_context_norm",
    "local_contrast_norm",
    "local_response_norm",
    "lyu_simoncelli_norm",
    "max_abs_scaling",
    "mean_normalization",
    "mean_only_batch_norm",
    "method",
    "methods_in",
    "min_max_scaling",
    "modulate",
    "moments",
    "nonlinearity_gain",
    "norm_penalty",
    "normalize",
    "normalize_gradients",
    "operator_norm",
    "operator_spectrum",
    "padding_mask",
    "param_groups",
    "partial_rms_norm",
    "positional_moments",
    "positional_norm",
    "power_iteration",
    "query_key_norm",
    "reassign_spectral_",
    "recalibrate",
    "recurrent_batch_norm",
    "renormalize_",
    "rescale",
    "rms_norm",
    "robust_scaling",
    "run",
    "scale_norm",
    "scaled_activation",
    "scaled_weight_standardization",
    "select",
    "spectral_norm",
    "standardize",
    "standardize_scaled",
    "switchable_norm",
    "sync_batch_norm",
    "unit_length",
    "unroll",
    "weigh_examples",
    "weight_conditioning",
    "weight_conditions",
    "weight_layout",
    "weight_norm",
    "weight_standardization",
    "whitening",
    "z_score",
]
