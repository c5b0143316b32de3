import numpy as np
import pytest
import reference

from repae_jax.metrics.precision_recall import precision_recall


def by_definition(real, samples, neighbors=3):
    """Precision and recall in float64, with all distances at once."""

    def distances(a, b):
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(axis=-1)

    def near(features, others):
        radii = np.sort(distances(others, others), axis=1)[:, neighbors]  # the first is the feature itself
        return (distances(features, others) <= radii).any(axis=1).mean()

    return near(samples, real), near(real, samples)


@pytest.mark.parametrize("block_size", [5000, 128, 77])
def test_golden(block_size, record_property):
    golden = reference.load("evaluation_metrics").arrays
    values = precision_recall(golden["reference_features"], golden["sample_features"], block_size=block_size)
    reference.check(values, [golden["precision"], golden["recall"]], 1e-12, "precision and recall", record_property)


@pytest.mark.parametrize("offset", [0, 1000])  # in float32, squares of the latter leave nothing of the distances
@pytest.mark.parametrize(("counts", "block_size"), [((40, 60), 100), ((40, 60), 7), ((60, 33), 32), ((4, 4), 1)])
def test_is_the_definition(offset, counts, block_size):
    rng = np.random.default_rng(0)
    real, samples = (rng.normal(size=(count, 5)) * scale + offset for count, scale in zip(counts, (1, 0.7)))
    assert precision_recall(real, samples, block_size=block_size) == pytest.approx(by_definition(real, samples))


def test_extremes():
    features = np.random.default_rng(2).normal(size=(50, 8))
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 100) == (0, 0)
    one_point = np.repeat(features[:1], 20, axis=0)
    precision, recall = precision_recall(features, one_point)
    assert precision == 1 and recall == 1 / 50  # copies of one real image, all of them at distance zero


def test_errors():
    with pytest.raises(ValueError, match=r"shapes \[9, 3\] and \[9, 4\]; .*same feature network"):
        precision_recall(np.zeros((9, 3)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="samples: 3 features; needed: more than the 3"):
        precision_recall(np.zeros((9, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(np.zeros((9, 3)), np.full((9, 3), np.nan))


def test_is_torch_fidelitys(record_property):
    golden = reference.load("feature_metrics")
    values = precision_recall(golden.arrays["reference"], golden.arrays["samples"])
    reference.check(values, [golden.meta["precision"], golden.meta["recall"]], 1e-6, "precision and recall", record_property)
