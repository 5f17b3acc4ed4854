import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import preprocessing
from torch import Tensor
from torch.testing import assert_close

from normkit import Support
from normkit.core.errors import OptionError, ProtocolError, ShapeError
from normkit.preprocessing import GlobalContrast, RobustScaling, UnitLength, Whitening
from normkit.preprocessing.feature_scaling import MaxAbsScaling, MeanNormalization, MinMaxScaling, ZScore
from normkit.preprocessing.image_standardization import PUBLISHED, ImageStandardization

PAIRS = [
    (lambda: MinMaxScaling(), lambda: preprocessing.MinMaxScaler()),
    (lambda: MinMaxScaling(-1, 1), lambda: preprocessing.MinMaxScaler((-1, 1))),
    (lambda: MinMaxScaling(clip=True), lambda: preprocessing.MinMaxScaler(clip=True)),
    (lambda: ZScore(), lambda: preprocessing.StandardScaler()),
    (lambda: MaxAbsScaling(), lambda: preprocessing.MaxAbsScaler()),
    (lambda: RobustScaling(), lambda: preprocessing.RobustScaler()),
    (lambda: RobustScaling((10, 95)), lambda: preprocessing.RobustScaler(quantile_range=(10, 95))),
    (lambda: UnitLength(1), lambda: preprocessing.Normalizer("l1")),
    (lambda: UnitLength(2), lambda: preprocessing.Normalizer("l2")),
]

shapes = st.tuples(st.integers(1, 12), st.integers(1, 5))


def sample(shape: tuple[int, int], scale: float, constant: bool) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64) * scale + 5 * scale
    if constant:
        x[:, 0] = 0.1 * scale
    return x


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: repr(pair[1]()))
@given(shape=shapes, scale=st.sampled_from([1e-3, 1.0, 1e6]), constant=st.booleans())
def test_equals_scikit_learn(pair: tuple, shape: tuple[int, int], scale: float, constant: bool) -> None:
    ours, theirs = pair[0](), pair[1]()
    x, fresh = sample(shape, scale, constant), sample(shape, scale, False)
    theirs.fit(x.numpy())
    ours.fit(x)
    for z in (x, fresh):
        assert_close(ours(z), torch.from_numpy(theirs.transform(z.numpy())), rtol=1e-9, atol=1e-9)
    if hasattr(theirs, "inverse_transform"):
        y = ours(x)
        wanted = torch.from_numpy(theirs.inverse_transform(y.numpy()))
        assert_close(ours.inverse_transform(y), wanted, rtol=1e-9, atol=1e-9)


def test_unit_length_by_the_largest_element() -> None:
    x = torch.tensor([[1.0, -4.0, 2.0], [0.0, 0.0, 0.0]])
    assert_close(UnitLength(math.inf)(x), torch.tensor([[0.25, -1.0, 0.5], [0.0, 0.0, 0.0]]))
    # scikit-learn's "max" divides by the largest value rather than the largest absolute value, where all are positive alike.
    z = torch.rand(6, 4, dtype=torch.float64)
    assert_close(UnitLength(math.inf)(z), torch.from_numpy(preprocessing.Normalizer("max").transform(z.numpy())))


@pytest.mark.parametrize("order", [1, 2, math.inf])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_unit_length_neither_overflows_nor_vanishes(order: float, size: float) -> None:
    x = torch.tensor([[3.0, 4.0]]) * size
    assert_close(torch.linalg.vector_norm(UnitLength(order)(x), order, dim=1), torch.ones(1))


def test_unit_length_of_tokens() -> None:
    y = UnitLength(support=Support("* d", over="d"))(torch.randn(2, 5, 8, dtype=torch.float64))
    assert_close(y.norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "low", "high", "mean", "std"),
    [
        (lambda s: MinMaxScaling(-1, 1, support=s), -1, 1, None, None),
        (lambda s: ZScore(s), None, None, 0, 1),
        (lambda s: MeanNormalization(s), None, None, 0, None),
        (lambda s: MaxAbsScaling(s), None, 1, None, None),
    ],
    ids=["min-max", "z-score", "mean", "max-abs"],
)
@pytest.mark.parametrize(
    ("support", "shape", "dims"),
    [
        (Support("n *", over="n"), (20, 3, 4), (0,)),
        (Support("n c *", over="n *"), (5, 3, 4, 2), (0, 2, 3)),
        (Support("n * c", over="n *"), (5, 4, 2, 3), (0, 1, 2)),
        (Support("* d", over="*"), (4, 5, 3), (0, 1)),
        (Support("n (g c) *", over="n c *", g=2), (5, 6, 4), None),
        (Support("n *", over="n *"), (6, 3), (0, 1)),
    ],
    ids=str,
)
def test_statistics_of_the_training_set_over_any_support(make, low, high, mean, std, support, shape, dims) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 3 + 50
    y = make(support).fit(x)(x)
    assert y.shape == x.shape
    if dims is None:
        y, dims = y.view(5, 2, 3, 4), (0, 2, 3)
    measured = y.amin(dims), y.amax(dims), y.mean(dims), y.std(dims, correction=0)
    for wanted, found in zip((low, high, mean, std), measured, strict=True):
        if wanted is not None:
            assert_close(found, torch.full_like(found, wanted), rtol=1e-9, atol=1e-9)
    if isinstance(make(support), MeanNormalization):
        assert_close(y.amax(dims) - y.amin(dims), torch.ones_like(y.amax(dims)))


def test_the_bounds_of_the_training_data_are_met_exactly() -> None:
    x = torch.randn(1000, 5)
    y = MinMaxScaling(-1, 1).fit(x)(x)
    assert (y.amin(0) == -1).all()
    assert (y.amax(0) == 1).all()


def test_long_streams_far_from_zero_do_not_drift() -> None:
    x = 1e4 + torch.randn(20000, 1)
    score = ZScore()
    for part in x.split(7):
        score.partial_fit(part)
    # Merging 2858 batches in float32 would lose the mean's third decimal; float64 keeps them all.
    assert_close(score.mean, x.double().mean(0), rtol=1e-12, atol=0)
    assert_close(score.var, x.double().var(0, correction=0), rtol=1e-9, atol=0)


def test_a_large_batch_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 3, dtype=torch.float64)
    wanted = ZScore().fit(x)
    monkeypatch.setattr("normkit.preprocessing.fitting._PIECE", 64)
    found = ZScore().fit(x)
    assert_close(found.state_dict(), wanted.state_dict(), rtol=1e-12, atol=1e-12)
    assert int(found.count) == 100


def test_bad_members_are_named() -> None:
    x = torch.ones(2, 3, 4)
    x[0, 2, 1] = torch.nan
    with pytest.raises(OptionError, match=r"column \(2, 1\);"):
        ZScore().fit(x)
    with pytest.raises(OptionError, match="channel 2;"):
        ZScore(Support("n c *", over="n *")).fit(x)
    with pytest.raises(OptionError, match="in the data"):
        ZScore(Support("n *", over="n *")).fit(x)
    assert ZScore().fit(torch.randn(5, 2))(torch.tensor([[torch.nan, 1.0]])).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_published_constants_on_bytes_and_on_floats(dataset: str) -> None:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in PUBLISHED[dataset])
    images = torch.randint(0, 256, (2, len(mean), 3, 5), dtype=torch.uint8)
    module = ImageStandardization(dataset)
    wanted = (images.float() / 255 - mean) / std
    assert_close(module(images), wanted)
    assert_close(module(images.float() / 255), wanted)
    assert_close(ImageStandardization(dataset, maximum=255)(images.float()), wanted)
    assert_close(ImageStandardization(dataset, layout="n * c")(images.movedim(1, -1)).movedim(-1, 1), wanted)
    assert_close(ImageStandardization(dataset, layout="c *")(images[0]), wanted[0])
    assert_close(module.inverse_transform(wanted), images.float() / 255)
    back = ImageStandardization(dataset, maximum=255).inverse_transform(wanted)
    assert_close(back, images.float(), rtol=1e-5, atol=1e-4)
    with pytest.raises(ShapeError):
        module(torch.ones(2, 5, 3, 5))
    fresh = ImageStandardization(None)
    fresh.load_state_dict(module.state_dict())
    assert_close(fresh(images), wanted)


def test_published_constants_are_those_of_the_literature() -> None:
    assert PUBLISHED["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert PUBLISHED["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert PUBLISHED["cifar100"] == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    assert PUBLISHED["mnist"] == ((0.1307,), (0.3081,))


def test_images_measured_from_bytes() -> None:
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    module = ImageStandardization(None)
    for part in images.split(6):
        module.partial_fit((part, None))
    assert_close(module.mean, (images.double() / 255).mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    y = module(images)
    assert_close(y.std((0, 2, 3), correction=0), torch.ones(3))
    with pytest.raises(ProtocolError, match="given"):
        ImageStandardization("imagenet").partial_fit(images)
    assert_close(ImageStandardization("imagenet").fit(images).state_dict(), module.state_dict(), rtol=1e-6, atol=1e-6)


def test_global_contrast_of_images() -> None:
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64) * 7 + 2
    x[2] = 5.0
    y = GlobalContrast(scale=55.0)(x)
    assert_close(y[:2].mean((1, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(y[:2].std((1, 2, 3), correction=0), torch.full((2,), 55.0, dtype=torch.float64))
    assert (y[2] == 0).all()
    weak = GlobalContrast(regularizer=10.0)(x)
    wanted = (x[0] - x[0].mean()) / (10 + x[0].var(correction=0)).sqrt()
    assert_close(weak[0], wanted)
    faint = torch.tensor([[1e-10, -1e-10]], dtype=torch.float64)
    assert_close(GlobalContrast()(faint), faint / 1e-8)


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
