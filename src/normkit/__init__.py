"""normkit: normalization for PyTorch networks.

Every normalization computes statistics over a support set, normalizes by them, and compensates. ``Support`` writes the set
down once; layers, functions, pictures, tests and kernels follow from it.
"""

from normkit.activations.batch_norm import BatchNorm, batch_norm
from normkit.activations.group_norm import GroupNorm, group_norm
from normkit.activations.instance_norm import InstanceNorm, instance_norm
from normkit.activations.layer_norm import LayerNorm, layer_norm
from normkit.activations.rms_norm import RMSNorm, rms_norm
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
from normkit.core.memory import Running, RunningStatistics
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.diagnostics.conditioning import chi, condition_number, operator_spectrum, weight_conditions
from normkit.engine.dispatch import explain, normalize, run
from normkit.surgery.changes import Change, Changes
from normkit.surgery.condition import condition
from normkit.surgery.convert import convert
from normkit.surgery.fold import fold
from normkit.surgery.recipe import Recipe, apply_recipe
from normkit.surgery.select import select
from normkit.weights.spectral_norm import SpectralNorm, spectral_norm
from normkit.weights.weight_conditioning import Equilibrate, equilibrate, weight_conditioning
from normkit.weights.weight_norm import WeightNorm, weight_norm
from normkit.weights.weight_standardization import WeightStandardization, standardize, weight_standardization

__version__ = "0.1.0"
