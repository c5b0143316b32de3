import numpy as np
import pytest
import reference

from repae_jax.metrics.monge import monge_inception_distance, random_directions
from repae_jax.metrics.resampling import GROUPS, random_groups


def by_definition(reference_features, samples, directions):
    """MIND in float64, direction by direction."""
    distances = [np.mean((np.sort(samples @ u) - np.sort(reference_features @ u)) ** 2) for u in directions.astype(np.float64)]
    return 3 * samples.shape[1] * np.mean(distances)


def test_is_torch_fidelitys(record_property):
    golden = reference.load("feature_metrics")
    arrays = golden.arrays
    value, _ = monge_inception_distance(arrays["reference"][:60], arrays["samples"], arrays["directions"])
    reference.check(value, golden.meta["mind"], 1e-5, "MIND", record_property)


def test_by_hand():
    """In one dimension there is one direction: both sorted, 3 times the mean squared difference."""
    samples, others = np.arange(20.0)[:, None], np.arange(20.0)[::-1, None] + 2
    assert monge_inception_distance(others, samples)[0] == pytest.approx(3 * 4)


def test_error_is_the_jackknifes(record_property):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(40, 5)) + 0.4
    directions = random_directions(5, 7)
    _, error = monge_inception_distance(x, y, directions)
    # the order in which images are drawn changes the groups that they are in, so the same draw is made here
    order = np.random.default_rng(2020)
    y_drawn, x_drawn = (features[order.permutation(40)[:40]] for features in (y, x))
    kept = [random_groups(40) != group for group in range(GROUPS)]
    values = np.array([by_definition(x_drawn[some], y_drawn[some], directions) for some in kept])
    expected = np.sqrt((GROUPS - 1) / GROUPS * ((values - values.mean()) ** 2).sum())
    reference.check(error, expected, 1e-4, "error of MIND", record_property)


def test_directions_are_unit_vectors():
    directions = random_directions(32, 2000)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)
    assert np.abs(directions.mean(axis=0)).max() < 4 / np.sqrt(32 * 2000)  # four deviations


def test_errors():
    with pytest.raises(ValueError, match="MIND: a set of features has 19 images; needed: 20"):
        monge_inception_distance(np.zeros((19, 3)), np.zeros((50, 3)))
    with pytest.raises(ValueError, match="same feature network"):
        monge_inception_distance(np.zeros((50, 3)), np.zeros((50, 4)))
