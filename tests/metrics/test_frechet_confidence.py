import numpy as np
import pytest
import scipy.stats

from repae_jax.metrics.frechet import frechet_distance, gaussian_stats
from repae_jax.metrics.frechet_confidence import frechet_confidence, line_at_zero, split, within_noise
from repae_jax.metrics.resampling import GROUPS, jackknife_error, random_groups

COUNT, SIZE = 400, 4


def draw(seed, count=COUNT):
    return np.random.default_rng(seed).normal(size=(count, SIZE)) * 1.1 + 0.1


REFERENCE = (np.zeros(SIZE), np.eye(SIZE))


def test_the_error_is_the_jackknifes():
    features = draw(0)
    kept = [random_groups(COUNT) != group for group in range(GROUPS)]
    values = np.array([frechet_distance(*gaussian_stats(features[some]), *REFERENCE) for some in kept])
    expected = np.sqrt((GROUPS - 1) / GROUPS * ((values - values.mean()) ** 2).sum())
    assert frechet_confidence(split(features), REFERENCE).stderr == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("in_a_row", [1, 4, COUNT])
def test_the_order_of_classes_does_no_harm(in_a_row):
    """Samples of 10 classes far apart: so many of a class, then of the next; of 1, every tenth sample is of one class."""
    rng = np.random.default_rng(3)
    classes = np.arange(COUNT * 10) // in_a_row % 10
    centers = rng.normal(size=(10, SIZE)) * 2
    features = centers[classes] + rng.normal(size=(COUNT * 10, SIZE))
    real = gaussian_stats(centers[classes] + rng.normal(size=(COUNT * 10, SIZE)))
    in_order, shuffled = (frechet_confidence(split(x), real) for x in (features, rng.permutation(features)))
    # the errors themselves are uncertain by a quarter; of groups that lack classes they are hundreds of times as large
    assert 0.4 < in_order.stderr / shuffled.stderr < 2.5
    assert abs(in_order.infinity - shuffled.infinity) < 4 * np.hypot(in_order.infinity_stderr, shuffled.infinity_stderr)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(1).normal(size=50)
    assert jackknife_error([np.delete(x, i).mean() for i in range(50)]) == pytest.approx(x.std(ddof=1) / np.sqrt(50))


@pytest.mark.integration
def test_errors_are_right_on_average():
    """Of 60 draws, the scatter of the distance is that which the error tells, and infinitely many samples come out."""
    drawn = [frechet_confidence(split(draw(seed)), REFERENCE) for seed in range(60)]
    values = [frechet_distance(*gaussian_stats(draw(seed)), *REFERENCE) for seed in range(60)]
    # the error of a deviation of 60 is 9 %, that of the mean of jackknives 3 %
    assert np.mean([one.stderr for one in drawn]) == pytest.approx(np.std(values, ddof=1), rel=0.3)
    true = SIZE * (0.1**2 + 0.1**2)
    assert np.mean(values) > true * 1.1, "few samples give larger distances"
    of_the_mean = np.std([one.infinity for one in drawn]) / np.sqrt(60)
    assert abs(np.mean([one.infinity for one in drawn]) - true) < 3 * of_the_mean


def test_too_few_samples_are_not_extrapolated():
    confidence = frechet_confidence(split(draw(0, 11)), REFERENCE)  # three sizes have more than 8 samples
    assert confidence.infinity is None and confidence.infinity_stderr is None and confidence.stderr > 0


def test_line_at_zero():
    x, y = np.array([0.1, 0.2, 0.4, 0.7]), np.array([1.0, 1.3, 1.1, 2.2])
    fit = scipy.stats.linregress(x, y)
    assert line_at_zero(x, y) == pytest.approx((fit.intercept, fit.intercept_stderr))


def test_within_noise():
    assert within_noise(2.0, 0.03, 2.09, 0.04)  # 1.96 * 0.05 = 0.098
    assert not within_noise(2.0, 0.03, 2.10, 0.04)
