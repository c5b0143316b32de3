import numpy as np
import pytest
from scipy.spatial.distance import cdist

from repae_jax.metrics.memorization import nearest


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 40]])
@pytest.mark.parametrize("block_size", [5000, 6])
def test_is_the_definition(cuts, block_size):
    rng = np.random.default_rng(0)
    training, samples = (rng.normal(size=(count, 5)).astype(np.float32) + 100 for count in (50, 17))
    found = nearest(samples, np.split(training, cuts), block_size=block_size)
    distances = cdist(samples.astype(np.float64), training)
    np.testing.assert_array_equal(found.neighbor, distances.argmin(axis=1))
    np.testing.assert_allclose(found.distance, distances.min(axis=1), rtol=1e-9)


@pytest.mark.parametrize("block_size", [5000, 4])
def test_training_images_leave_themselves_out(block_size):
    training = np.random.default_rng(1).normal(size=(30, 3))
    chosen = np.array([29, 0, 4, 17, 5])
    found = nearest(training[chosen], np.split(training, [9]), itself=chosen, block_size=block_size)
    distances = cdist(training, training)[chosen]
    distances[np.arange(5), chosen] = np.inf
    np.testing.assert_array_equal(found.neighbor, distances.argmin(axis=1))


@pytest.mark.parametrize("block_size", [5000, 4])
def test_copies_are_found(block_size):
    training = np.random.default_rng(2).normal(size=(30, 300)).astype(np.float32) + 10
    found = nearest(training[[3, 8]], [training[:7], training[7:]], block_size=block_size)
    np.testing.assert_array_equal(found.neighbor, [3, 8])
    np.testing.assert_array_equal(found.distance, 0)  # squares less products would leave about 0.01 of rounding


def test_errors():
    with pytest.raises(ValueError, match="no training image to compare with"):
        nearest(np.zeros((2, 3)), [])
    with pytest.raises(ValueError, match="no training image to compare with"):
        nearest(np.zeros((1, 3)), [np.zeros((1, 3))], itself=np.array([0]))
    with pytest.raises(ValueError, match="same feature network"):
        nearest(np.zeros((2, 3)), [np.zeros((5, 4))])
