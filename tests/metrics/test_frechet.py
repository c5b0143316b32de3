import numpy as np
import pytest
import reference

from repae_jax.metrics.frechet import frechet_distance, gaussian_stats


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
    centred = features - features.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(cov, centred.T @ centred / 4, rtol=1e-12)
    assert mean.dtype == cov.dtype == np.float64


def test_one_feature():
    mean, cov = gaussian_stats([[1.0], [3.0]])
    assert mean.shape == (1,) and cov.shape == (1, 1) and cov[0, 0] == 2


def test_diagonal_covariances():
    mean1, mean2 = np.array([0.0, 1.0, -2.0]), np.array([3.0, 1.0, 0.0])
    std1, std2 = np.array([1.0, 2.0, 0.0]), np.array([4.0, 0.5, 3.0])
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [40, 4])  # of full rank, and singular
def test_symmetric_and_zero_for_equal(count):
    rng = np.random.default_rng(1)
    one, two = (gaussian_stats(rng.normal(size=(count, 8)) * scale) for scale in (1, 3))
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-6)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"shape \[1, 3\]; allowed: \[N, F\] with N >= 2"):
        gaussian_stats(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="features of 1 of 4 images are not finite"):
        gaussian_stats([[0.0, 1.0], [np.nan, np.inf], [2.0, 3.0], [4.0, 5.0]])
    with pytest.raises(ValueError, match=r"shapes \[2\] and \[3\], covariances \[2, 2\] and \[3, 3\]"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="same feature network"):
        frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))
