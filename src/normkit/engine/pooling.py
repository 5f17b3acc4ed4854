"""Moments of a union of sets, from those of the sets."""

import math
from collections.abc import Sequence

from torch import Tensor

from normkit.core.moments import Moments


def pool(found: Moments, dims: Sequence[int]) -> Moments:
    """Mean and variance over some axes, from the moments of the sets along them, without reading the elements again.

    mean = sum_k n_k mean_k / n,  var = sum_k n_k (var_k + (mean_k - mean)^2) / n,  n = sum_k n_k.
    """
    dims = tuple(dims)
    if isinstance(found.n, Tensor):
        each = found.n.expand(found.mean.shape)
        total = each.sum(dims, keepdim=True)
        share = each / total.clamp_min(1)
        mean = (share * found.mean).sum(dims, keepdim=True)
        return Moments(mean, (share * (found.var + (found.mean - mean).square())).sum(dims, keepdim=True), total)
    mean = found.mean.mean(dims, keepdim=True)
    var = (found.var + (found.mean - mean).square()).mean(dims, keepdim=True)
    return Moments(mean, var, found.n * math.prod([found.mean.shape[d] for d in dims]))
