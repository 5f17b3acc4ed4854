"""Whitening: centre, decorrelate and equalize, so that the training data's covariance is the identity."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, check_options
from normkit.core.moments import accumulation_dtype, full_precision, moments
from normkit.core.support import Split, Support
from normkit.preprocessing.fitting import Fitted, like, wide

Method = Literal["pca", "zca"]


class Whitening(Fitted):
    """Subtract the mean, rotate onto uncorrelated axes and give each the variance 1, over the training data.

    With the covariance Sigma = U diag(lambda) U^T: ``"pca"`` gives z = (lambda + eps)^(-1/2) U^T (x - E[x]), largest variance
    first; ``"zca"`` gives z = U (lambda + eps)^(-1/2) U^T (x - E[x]), which is the whitened data closest to x.

    Directions in which the data does not vary are dropped: PCA then returns fewer features, ZCA zero along them. The inverse is
    exact for data in the span of the training data. ``partial_fit`` merges covariances exactly, and recomputes the
    decomposition each time.

    Args:
        method: ``"pca"`` or ``"zca"``. Default: ``"zca"``.
        eps: added to the variances; directions with a much smaller variance are damped. 0 whitens exactly. Default: 1e-5.
        equalize: False keeps the variances, so that PCA only decorrelates. Default: True.
        components: largest number of directions to keep. Default: None, all.
        rank_tolerance: directions whose variance is below this fraction of the largest are dropped. Default: 1e-10.
        support: its only kept axis holds the features. Default: ``Support("n d", over="n")``;
            ``Support("n c *", over="n *")`` whitens channels.
        dtype: dtype of the statistics. Default: float64.

    Shape: The support's axes; the output has the same shape; with PCA the feature axis has as many entries as there are
    directions.

    Raises:
        OptionError: unknown or incompatible options; a support that does not keep exactly one axis.

    Reference: LeCun, Bottou, Orr, Müller, "Efficient BackProp" (1998), https://doi.org/10.1007/3-540-49430-8_2, section
    4.3; ZCA: Bell and Sejnowski, "The independent components of natural scenes are edge filters" (1997),
    https://doi.org/10.1016/S0042-6989(97)00121-1.

    >>> x = torch.tensor([[1.0, 1.0], [3.0, 1.0], [1.0, 5.0], [3.0, 5.0]])
    >>> Whitening("pca", eps=0.0).fit(x)(x)
    tensor([[-1., -1.],
            [-1.,  1.],
            [ 1., -1.],
            [ 1.,  1.]])
    """

    statistics = ("mean", "covariance")
    mean: Tensor
    covariance: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(
        self,
        method: Method = "zca",
        *,
        eps: float = 1e-5,
        equalize: bool = True,
        components: int | None = None,
        rank_tolerance: float = 1e-10,
        support: Support | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(support or Support("n d", over="n"), device=device, dtype=dtype)
        check_options("Whitening", method=(method, Method))
        if method == "zca" and not equalize:
            raise OptionError("Whitening: zca without equalize rotates back and changes nothing; use method='pca'")
        if not eps >= 0 or not 0 <= rank_tolerance < 1:
            raise OptionError(
                f"Whitening: eps={eps}, rank_tolerance={rank_tolerance}; wanted numbers from 0, and below 1"
            )
        if components is not None and components < 1:
            raise OptionError(f"Whitening: components={components}; wanted a whole number from 1, or None")
        if len(self.support.kept) != 1 or "*" in self.support.kept or any(len(g) > 1 for g in self.support.groups):
            raise OptionError(
                f"Whitening: {self.support} does not keep one axis of features; flatten the data to 'n d', or whiten "
                'channels by Support("n c *", over="n *")'
            )
        self.method: Method = method
        self.eps, self.equalize, self.components, self.rank_tolerance = eps, equalize, components, rank_tolerance
        for name in ("eigenvalues", "eigenvectors"):
            self.register_buffer(name, torch.empty(0, device=device, dtype=dtype or torch.float64))

    def measure(self, x: Tensor, split: Split) -> dict[str, Tensor]:
        rows = wide(x).movedim(self._axis(split), -1).flatten(0, -2)
        mean = moments(rows, (0,)).mean
        rest = rows - mean
        with full_precision(rest):
            return {"mean": mean[0], "covariance": rest.mT @ rest / rows.shape[0]}

    def merge(self, n: int, old: dict[str, Tensor], more: int, new: dict[str, Tensor]) -> dict[str, Tensor]:
        share = more / (n + more)
        delta = new["mean"] - old["mean"]
        between = torch.outer(delta, delta) * (share * (1 - share))
        covariance = old["covariance"] * (1 - share) + new["covariance"] * share + between
        return {"mean": old["mean"] + delta * share, "covariance": covariance}

    def forward(self, x: Tensor) -> Tensor:
        accumulation_dtype(x.dtype)
        split = self._ready(x, self.mean.shape)
        values, vectors, mean = self._in(x)
        with full_precision(x):
            z = (x.movedim(self._axis(split), -1).to(mean.dtype) - mean) @ vectors
            if self.equalize:
                z = z / (values + self.eps).sqrt()
            if self.method == "zca":
                z = z @ vectors.mT
        return z.movedim(-1, self._axis(split)).to(x.dtype)

    def inverse_transform(self, y: Tensor) -> Tensor:
        accumulation_dtype(y.dtype)
        wanted = self.mean.shape if self.method == "zca" else self.eigenvalues.shape
        split = self._ready(y, wanted)
        values, vectors, mean = self._in(y)
        with full_precision(y):
            z = y.movedim(self._axis(split), -1).to(mean.dtype)
            if self.method == "zca":
                z = z @ vectors
            if self.equalize:
                z = z * (values + self.eps).sqrt()
            x = z @ vectors.mT + mean
        return x.movedim(-1, self._axis(split)).to(y.dtype)

    def _store(self, count: int, values: Mapping[str, Tensor]) -> None:
        super()._store(count, values)
        variances, axes = torch.linalg.eigh(values["covariance"])
        variances, axes = variances.flip(0), axes.flip(1)
        rank = int((variances > self.rank_tolerance * variances[:1].clamp_min(0)).sum())
        rank = min(rank, self.components or rank)
        axes = axes[:, :rank]
        if rank:  # the sign of an eigenvector is arbitrary: a positive largest entry gives the same result everywhere
            largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
            axes = axes * torch.where(largest < 0, -1.0, 1.0)
        self.eigenvalues = variances[:rank].to(self.mean)
        self.eigenvectors = axes.to(self.mean).contiguous()  # so that a loaded copy computes the same to the last bit

    def _in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(accumulation_dtype(x.dtype), self.mean.dtype)
        return self.eigenvalues.to(dtype), self.eigenvectors.to(dtype), self.mean.to(dtype)

    def _axis(self, split: Split) -> int:
        return next(d for d in range(len(split.shape)) if d not in split.dims)

    def extra_repr(self) -> str:
        return (
            f"{self.method!r}, eps={self.eps}, equalize={self.equalize}, components={self.components}, "
            f"rank_tolerance={self.rank_tolerance}, {super().extra_repr()}"
        )


def whitening(input: Tensor, method: Method = "zca", *, eps: float = 1e-5, support: Support | None = None) -> Tensor:
    """Whiten data by its own mean and covariance, which are taken as constant in the gradient; see Whitening.

    >>> whitening(torch.tensor([[1.0], [5.0]]), eps=0.0).T
    tensor([[-1.,  1.]])
    """
    return Whitening(method, eps=eps, support=support, **like(input)).fit(input)(input)


CARD = Card(
    title="Whitening (PCA, ZCA)",
    kind="input",
    normalized_over="all features together, over the training data",
    formula="z = U (Lambda + eps)^(-1/2) U^T (x - E[x]), with Cov[x] = U Lambda U^T",
    paper=paper("lecun1998efficient"),
    use_cases="correlated inputs of up to a few thousand features; linear models; image patches",
    strengths="the loss of a linear layer becomes equally curved in all directions: condition number 1",
    weaknesses="cubic in the features; needs more samples than features; amplifies noise in directions of little variance",
    module=Whitening,
    functional=whitening,
    streams=True,
)
