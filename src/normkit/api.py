"""The top-level names. ``normkit`` loads them from here when the first is requested; all else has a namespace."""

import normkit.catalogue as catalogue
import normkit.diagnostics as diagnostics
import normkit.errors as errors
import normkit.functional as functional
import normkit.gradients as gradients
import normkit.preprocessing as preprocessing
import normkit.schedules as schedules
import normkit.surgery as surgery
import normkit.weights as weights
from normkit.activations.adaptive_layer_norm import AdaLayerNorm, AdaLayerNormOutput, AdaLayerNormZeroBlock, FiLM
from normkit.activations.batch_channel_norm import BatchChannelNorm, EstBatchNorm
from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.activations.batch_norm import BatchNorm, MeanOnlyBatchNorm
from normkit.activations.batch_renorm import BatchRenorm
from normkit.activations.conditional_norm import ConditionalNorm, SpatiallyAdaptiveNorm
from normkit.activations.conditioned_tokens import ConditionedTokens
from normkit.activations.divisive_norm import DivisiveNorm, HeegerNorm, LyuSimoncelliNorm
from normkit.activations.dynamic_tanh import DynamicTanh
from normkit.activations.gated_rms_norm import GatedRMSNorm, SeeDNorm
from normkit.activations.gdn import GDN
from normkit.activations.ghost_batch_norm import GhostBatchNorm
from normkit.activations.global_response_norm import FilterResponseNorm, GlobalResponseNorm
from normkit.activations.group_norm import GroupNorm, LocalContextNorm
from normkit.activations.hypersphere import HypersphereResidual, LearnedScale
from normkit.activations.instance_norm import AdaptiveInstanceNorm, InstanceNorm
from normkit.activations.layer_norm import LayerNorm, PositionalNorm
from normkit.activations.local_response_norm import LocalContrastNorm, LocalResponseNorm
from normkit.activations.normalizer_free import NormalizerFreeBlock
from normkit.activations.query_key_norm import PreconditionedAttention, QueryKeyNorm
from normkit.activations.recurrent_batch_norm import BatchNormLSTM, BatchNormRNN, RecurrentBatchNorm
from normkit.activations.recurrent_layer_norm import (
    LayerNormGRUCell,
    LayerNormLSTMCell,
    LayerNormRecurrent,
    LayerNormRNNCell,
)
from normkit.activations.rms_norm import PartialRMSNorm, RMSNorm
from normkit.activations.scale_norm import FixNorm, HoloNorm, ScaleNorm
from normkit.activations.switchable_norm import ExemplarNorm, SwitchableNorm
from normkit.activations.sync_batch_norm import SyncBatchNorm
from normkit.catalogue.methods import METHODS
from normkit.core.compensation import Affine
from normkit.core.errors import NormkitError
from normkit.core.memory import Running
from normkit.core.moments import Moments
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.diagnostics.audit.checks import audit
from normkit.diagnostics.monitor import Monitor
from normkit.engine.dispatch import explain, normalize
from normkit.engine.layer import Layer
from normkit.residual import Residual
from normkit.surgery.accelerate import accelerate
from normkit.surgery.condition import condition
from normkit.surgery.convert import convert
from normkit.surgery.fold import fold
from normkit.surgery.recalibrate import recalibrate
from normkit.surgery.recipe import apply_recipe

__all__ = [
    "GDN",
    "METHODS",
    "AdaLayerNorm",
    "AdaLayerNormOutput",
    "AdaLayerNormZeroBlock",
    "AdaptiveInstanceNorm",
    "Affine",
    "BatchChannelNorm",
    "BatchGroupNorm",
    "BatchNorm",
    "BatchNormLSTM",
    "BatchNormRNN",
    "BatchRenorm",
    "ConditionalNorm",
    "ConditionedTokens",
    "DivisiveNorm",
    "DynamicTanh",
    "EstBatchNorm",
    "ExemplarNorm",
    "FiLM",
    "FilterResponseNorm",
    "FixNorm",
    "GatedRMSNorm",
    "GhostBatchNorm",
    "GlobalResponseNorm",
    "GroupNorm",
    "HeegerNorm",
    "HoloNorm",
    "HypersphereResidual",
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
    "MeanOnlyBatchNorm",
    "Moments",
    "Monitor",
    "NormalizerFreeBlock",
    "NormkitError",
    "PartialRMSNorm",
    "PositionalNorm",
    "PreconditionedAttention",
    "QueryKeyNorm",
    "RMSNorm",
    "RecurrentBatchNorm",
    "Residual",
    "Rule",
    "Running",
    "ScaleNorm",
    "SeeDNorm",
    "SpatiallyAdaptiveNorm",
    "Statistic",
    "Support",
    "SwitchableNorm",
    "SyncBatchNorm",
    "accelerate",
    "apply_recipe",
    "audit",
    "catalogue",
    "condition",
    "convert",
    "diagnostics",
    "errors",
    "explain",
    "fold",
    "functional",
    "gradients",
    "normalize",
    "preprocessing",
    "recalibrate",
    "schedules",
    "surgery",
    "weights",
]
