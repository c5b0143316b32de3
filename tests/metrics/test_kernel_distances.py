import numpy as np
import pytest
import reference

from repae_jax.metrics.kernel_distances import cmmd, kernel_inception_distance
from repae_jax.metrics.resampling import GROUPS, random_groups


@pytest.fixture(scope="module")
def golden():
    return reference.load("feature_metrics")


def test_kid_is_torch_fidelitys(golden, record_property):
    given = golden.arrays["reference"], golden.arrays["samples"], golden.meta["kid_subsets"], golden.meta["kid_subset_size"]
    values = kernel_inception_distance(*given)
    # torch-fidelity computes in float32
    reference.check(values, [golden.meta["kid"], golden.meta["kid_std"]], 1e-5, "KID", record_property)


def test_kid_by_hand():
    """Two features per set, of one number: all pairs can be counted."""
    reference_features, samples = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    # kernel (x y + 1)^3: samples 1 * 2 -> 27; reference 0 * 1 -> 1; across: 1, 1, 8, 27 -> mean 37 / 4
    value, deviation = kernel_inception_distance(reference_features, samples, subsets=3, subset_size=2)
    assert value == pytest.approx(27 + 1 - 2 * 37 / 4) and deviation == pytest.approx(0, abs=1e-12)


def by_definition(reference_features, samples):
    """CMMD in float64, as its paper writes it, with all kernels at once."""

    def mean_kernel(a, b):
        squares = ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(axis=-1)
        return np.exp(-squares / (2 * 10**2)).mean()

    x, y = samples, reference_features
    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def unit(count, seed, shift=0.0):
    features = np.random.default_rng(seed).normal(size=(count, 16)) + shift
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("counts", "block_size"), [((60, 45), 5000), ((60, 45), 4), ((33, 81), 3)])
def test_cmmd_is_the_definition(counts, block_size, record_property):
    x, y = unit(counts[0], 1), unit(counts[1], 2, shift=0.3)
    value, error = cmmd(x, y, block_size)
    reference.check(value, by_definition(x, y), 1e-5, "CMMD", record_property)
    left_out = [
        by_definition(x[random_groups(len(x)) != group], y[random_groups(len(y)) != group]) for group in range(GROUPS)
    ]
    expected = np.sqrt((GROUPS - 1) / GROUPS * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    reference.check(error, expected, 1e-4, "error of CMMD", record_property)


def test_cmmd_of_equal_sets_is_zero():
    features = unit(40, 3)
    assert cmmd(features, features)[0] == pytest.approx(0, abs=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="KID: a set of features has 9 images; needed: 1000"):
        kernel_inception_distance(np.zeros((2000, 3)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match="CMMD: a set of features has 19 images; needed: 20"):
        cmmd(np.zeros((19, 3)), np.zeros((50, 3)))
    with pytest.raises(ValueError, match=r"shapes \[50, 3\] and \[50, 4\]; .*same feature network"):
        cmmd(np.zeros((50, 3)), np.zeros((50, 4)))
    with pytest.raises(ValueError, match="not finite"):
        cmmd(np.zeros((50, 3)), np.full((50, 3), np.nan))
