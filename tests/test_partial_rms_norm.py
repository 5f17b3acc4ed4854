"""Partial RMS normalization: which features are measured, and what it equals."""

import pytest
import torch
from torch.testing import assert_close

from normkit.activations.partial_rms_norm import PartialRMSNorm, partial_rms_norm
from normkit.activations.rms_norm import rms_norm
from normkit.core.errors import OptionError, ShapeError


@pytest.mark.parametrize("guard", ["inside", "outside", "floor"])
def test_all_features_are_rms_norm(guard: str) -> None:
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = partial_rms_norm(x, 1.0, weight, eps=0.1, guard=guard)
    assert_close(found, rms_norm(x, 6, weight, 0.1, guard=guard), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("features", "fraction"), [(8, 0.1), (8, 0.0), (8, -1.0), (8, 1.2)])
def test_a_fraction_without_a_feature_is_refused(features: int, fraction: float) -> None:
    with pytest.raises(OptionError, match=f"fraction={fraction}"):
        PartialRMSNorm(features, fraction)
    with pytest.raises(OptionError, match=r"a fraction from 0\.125 to 1"):
        partial_rms_norm(torch.randn(2, features), fraction)


def test_options() -> None:
    made = PartialRMSNorm(4, 0.5, elementwise_affine=False, bias=True)
    assert list(made.state_dict()) == ["bias"]
    with pytest.raises(ShapeError, match="features=4"):
        made(torch.randn(2, 5))
    with pytest.raises(OptionError, match="guard"):
        PartialRMSNorm(4, 0.5, guard="around")
