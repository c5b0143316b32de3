import numpy as np
import pytest
import reference

from repae_jax.metrics.inception_score import SPLIT_SIZE, RunningInceptionScore


def score_of(logits, split_size, *cuts):
    running = RunningInceptionScore(split_size)
    for part in np.split(logits, cuts):
        running.update(part)
    return running.result()


def test_golden(record_property):
    golden = reference.load("evaluation_metrics").arrays
    mean, _ = score_of(golden["logits"], 200)
    reference.check(mean, golden["inception_score_split200"], 1e-6, "inception score", record_property)


def test_batches_change_nothing():
    """Batches that begin and end anywhere, one of them empty, one with several splits in it."""
    logits = np.random.default_rng(0).normal(size=(1050, 6)) * 3
    expected = score_of(logits, 200)
    np.testing.assert_allclose(score_of(logits, 200, 1, 1, 199, 201, 900), expected, rtol=1e-12)


def test_published_splits():
    logits = np.random.default_rng(0).normal(size=(10_001, 4))
    assert score_of(logits, SPLIT_SIZE) == score_of(logits, 5000)
    assert RunningInceptionScore()._split_size == 5000


def test_bounds():
    assert score_of(np.zeros((50, 8)), 20) == pytest.approx((1, 0))
    certain = 1e3 * np.eye(8)[np.arange(64) % 8]  # probabilities that underflow to zero
    assert score_of(certain, 32) == pytest.approx((8, 0))
    # all of one class, in splits: each has nothing to tell
    assert score_of(certain[np.argsort(np.arange(64) % 8)], 8) == pytest.approx((1, 0))


def test_the_last_split_may_be_shorter():
    logits = np.random.default_rng(1).normal(size=(25, 4)) * 2
    parts = [score_of(part, 100)[0] for part in np.split(logits, [10, 20])]
    assert score_of(logits, 10) == pytest.approx((np.mean(parts), np.std(parts)))


def test_errors():
    with pytest.raises(ValueError, match=r"logits have shape \[3\]"):
        RunningInceptionScore().update(np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        RunningInceptionScore().update([[0.0, np.nan]])
    with pytest.raises(ValueError, match="there are no logits"):
        RunningInceptionScore().result()
    with pytest.raises(ValueError, match="split_size is 0"):
        RunningInceptionScore(0)
