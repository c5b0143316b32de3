import numpy as np
import pytest
import reference
import scipy.linalg

from repae_jax.metrics.frechet import RunningGaussian, frechet_distance, gaussian_stats


@pytest.fixture(scope="module")
def golden():
    return reference.load("evaluation_metrics").arrays


# 16 samples of 24 features: the second case has a singular covariance
@pytest.mark.parametrize("name, count", [("fid", None), ("fid_first16_samples", 16)])
def test_golden(golden, name, count, record_property):
    features = golden["reference_features"], golden["sample_features"][:count]
    distance = frechet_distance(*gaussian_stats(features[0]), *gaussian_stats(features[1]))
    reference.check(distance, golden[name], 1e-5, name, record_property)


def test_gaussian_stats():
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    mean, cov = gaussian_stats(features)
    centered = features - features.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(cov, centered.T @ centered / 4, rtol=1e-12)
    assert mean.dtype == cov.dtype == np.float64


def test_golden_in_batches(golden):
    """The golden statistics do not depend on how the features are cut."""
    stats = []
    for features in (golden["reference_features"], golden["sample_features"]):
        running = RunningGaussian()
        for part in np.split(features, [1, 1, 3, 200]):
            running.update(part)
        stats += running.stats()
    reference.check(frechet_distance(*stats), golden["fid"], 1e-5, "fid in batches")


@pytest.mark.parametrize("offset", [0, 1e6])
def test_running_gaussian(offset):
    """Nothing cancels: deviations of 1 on a mean of a million, summed as squares, would lose 12 of 16 digits."""
    features = np.random.default_rng(0).normal(size=(1000, 5)) + offset
    expected = np.cov(features - offset, rowvar=False)
    left, right = RunningGaussian(), RunningGaussian()
    for part in np.split(features[:600], 40):
        left.update(part)
    right.update(features[600:])
    left.merge(right)
    left.merge(RunningGaussian())
    mean, cov = left.stats()
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(cov, expected, atol=1e-8 if offset else 1e-13)
    resumed = RunningGaussian(left.count, left.mean, left.scatter)  # its attributes are all there is to keep
    np.testing.assert_array_equal(resumed.stats()[1], cov)


@pytest.mark.parametrize("counts", [(300, 200), (300, 12), (9, 12)])  # the latter are singular
def test_against_the_general_matrix_root(counts):
    """scipy's root of the product, where it works; of singular ones only up to the root of its rounding."""
    rng = np.random.default_rng(3)
    first, second = (
        gaussian_stats(rng.normal(size=(count, 24)) @ rng.normal(size=(24, 24)) + shift) for count, shift in zip(counts, (0, 1))
    )
    root = scipy.linalg.sqrtm(first[1] @ second[1]).real
    expected = ((first[0] - second[0]) ** 2).sum() + np.trace(first[1]) + np.trace(second[1]) - 2 * np.trace(root)
    singular = min(counts) <= 24
    assert frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-5 if singular else 1e-10)


def test_singular_against_the_nuclear_norm():
    """tr (S1 S2)^(1/2) = |X1 X2^T|_* of the deviations, which needs no root of a singular matrix."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(9, 40)), 2 * rng.normal(size=(12, 40))
    first, second = gaussian_stats(x), gaussian_stats(y)
    deviations = (x - x.mean(axis=0)) / np.sqrt(8), (y - y.mean(axis=0)) / np.sqrt(11)
    root_trace = np.linalg.svd(deviations[0] @ deviations[1].T, compute_uv=False).sum()
    expected = ((first[0] - second[0]) ** 2).sum() + np.trace(first[1]) + np.trace(second[1]) - 2 * root_trace
    assert frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-6)


def test_closed_form_of_ten_thousand_features():
    """Commuting covariances have distance |m1 - m2|^2 + sum (s1 - s2)^2; 10,000 draws come near it."""
    rng = np.random.default_rng(5)
    size, count = 64, 10_000
    rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
    std1, std2, shift = rng.uniform(0.5, 2, size), rng.uniform(0.5, 2, size), rng.normal(size=size) / 4
    first, second = (rng.normal(size=(count, size)) * std @ rotation.T + move for std, move in ((std1, 0), (std2, shift)))
    expected = (shift**2).sum() + ((std1 - std2) ** 2).sum()
    exact = frechet_distance(
        np.zeros(size), rotation * std1**2 @ rotation.T, shift, rotation * std2**2 @ rotation.T
    )  # fmt: skip
    assert exact == pytest.approx(expected, rel=1e-10)
    # the bias of finite counts is about tr(S) F / 2N of each side
    assert frechet_distance(*gaussian_stats(first), *gaussian_stats(second)) == pytest.approx(expected, rel=0.05)


def test_one_feature():
    mean, cov = gaussian_stats([[1.0], [3.0]])
    assert mean.shape == (1,) and cov.shape == (1, 1) and cov[0, 0] == 2


def test_diagonal_covariances():
    mean1, mean2 = np.array([0.0, 1.0, -2.0]), np.array([3.0, 1.0, 0.0])
    std1, std2 = np.array([1.0, 2.0, 0.0]), np.array([4.0, 0.5, 3.0])
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [40, 4])  # full rank, and singular
def test_symmetric_and_zero_for_equal(count):
    rng = np.random.default_rng(1)
    first, second = (gaussian_stats(rng.normal(size=(count, 8)) * scale) for scale in (1, 3))
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), rel=1e-6)
    assert frechet_distance(*first, *first) == pytest.approx(0, abs=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"shape \[3\]; allowed: \[N, F\]"):
        gaussian_stats(np.zeros(3))
    with pytest.raises(ValueError, match="features of 1 images; a covariance needs 2"):
        gaussian_stats(np.zeros((1, 3)))
    running = RunningGaussian()
    running.update(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="features have 2 numbers, those before 3"):
        running.update(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="features of 1 of 4 images are not finite"):
        gaussian_stats([[0.0, 1.0], [np.nan, np.inf], [2.0, 3.0], [4.0, 5.0]])
    with pytest.raises(ValueError, match=r"shapes \[2\] and \[3\], covariances \[2, 2\] and \[3, 3\]"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="same feature network"):
        frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))
