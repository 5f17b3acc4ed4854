import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from normkit.core.support import Support
from normkit.preprocessing.whitening import Whitening


def correlated(samples: int = 400, features: int = 5) -> Tensor:
    torch.manual_seed(1)
    mix = torch.randn(features, features, dtype=torch.float64)
    scales = torch.logspace(-1, 1, features, dtype=torch.float64)
    return torch.randn(samples, features, dtype=torch.float64) @ mix * scales + torch.linspace(3, -2, features).double()


def covariance(x: Tensor) -> Tensor:
    return x.mT.cov(correction=0)


@pytest.mark.parametrize("method", ["pca", "zca"])
def test_covariance_becomes_the_identity(method: str) -> None:
    x = correlated()
    z = Whitening(method, eps=0.0).fit(x)(x)
    # The covariance's condition is some 1e4, so inverses lose four of sixteen digits.
    assert_close(covariance(z), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(z.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)
    damped = covariance(Whitening(method, eps=1e-2).fit(x)(x))
    values = torch.linalg.eigvalsh(covariance(x))
    assert_close(torch.linalg.eigvalsh(damped), values / (values + 1e-2), rtol=1e-9, atol=1e-9)


def test_zca_is_the_symmetric_root_and_pca_a_rotation_of_it() -> None:
    x = correlated()
    pca, zca = Whitening("pca", eps=0.0).fit(x), Whitening(eps=0.0).fit(x)
    assert_close(pca(x) @ pca.eigenvectors.mT, zca(x), rtol=1e-9, atol=1e-9)
    root = torch.linalg.solve(zca.covariance, zca(torch.eye(5, dtype=torch.float64)) - zca(torch.zeros(1, 5).double()))
    assert_close(root @ zca.covariance, (root @ zca.covariance).mT, rtol=1e-6, atol=1e-6)
    assert (pca.eigenvalues.diff() <= 0).all()
    assert (pca.eigenvectors.gather(0, pca.eigenvectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_without_equalizing_the_variances_stay() -> None:
    x = correlated()
    z = Whitening("pca", equalize=False).fit(x)(x)
    assert_close(covariance(z), torch.linalg.eigvalsh(covariance(x)).flip(0).diag(), rtol=1e-9, atol=1e-9)
    assert_close(Whitening("pca", equalize=False).fit(x).inverse_transform(z), x)


@pytest.mark.parametrize("method", ["pca", "zca"])
@given(features=st.integers(1, 6), rank=st.integers(1, 6), samples=st.integers(1, 12))
def test_directions_without_variance_are_dropped(method: str, features: int, rank: int, samples: int) -> None:
    x = torch.randn(samples, rank, dtype=torch.float64) @ torch.randn(rank, features, dtype=torch.float64) + 2
    white = Whitening(method, eps=0.0, rank_tolerance=1e-8).fit(x)
    z = white(x)
    kept = min(features, rank, samples - 1)
    assert white.eigenvalues.shape == (kept,)
    assert z.shape == (samples, kept if method == "pca" else features)
    rest = z - z.mean(0)
    spectrum = torch.linalg.eigvalsh(rest.mT @ rest / samples).flip(0)
    wanted = torch.zeros(z.shape[1], dtype=torch.float64)
    wanted[:kept] = 1
    # Variances down to 1e-8 of the largest are kept, and those have half of their digits.
    assert_close(spectrum, wanted, rtol=0, atol=1e-5)
    assert_close(white.inverse_transform(z), x, rtol=1e-6, atol=1e-6)


def test_components_keep_the_largest_variances() -> None:
    x = correlated()
    two, all_ = Whitening("pca", components=2).fit(x), Whitening("pca").fit(x)
    assert_close(two(x), all_(x)[:, :2])
    left = (two.inverse_transform(two(x)) - x).square().sum(1).mean()
    assert_close(left, all_.eigenvalues[2:].sum(), rtol=1e-6, atol=1e-6)


def test_channels_of_images_are_whitened_over_positions() -> None:
    x = correlated(6 * 4 * 4, 3).view(6, 4, 4, 3).movedim(-1, 1)
    support = Support("n c *", over="n *")
    white = Whitening("pca", eps=0.0, support=support).fit(x)
    z = white(x)
    assert z.shape == x.shape
    assert_close(covariance(z.movedim(1, -1).reshape(-1, 3)), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(white.inverse_transform(z), x, rtol=1e-9, atol=1e-9)


def test_mixed_precision_leaves_the_products_exact() -> None:
    x = correlated().float()
    white = Whitening(eps=0.0, dtype=torch.float32).fit(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = white(x)
        back = white.inverse_transform(z)
    assert_close((z, back), (white(x), white.inverse_transform(z)), rtol=0, atol=0)
