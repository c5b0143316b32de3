import numpy as np
import pytest
from scipy import stats

from repae_jax.analysis import channels


def draw(shape=(3, 4, 4, 5), seed=0):
    return np.random.default_rng(seed).gamma(2.0, size=shape) * np.arange(1, shape[-1] + 1)


def test_stats_against_scipy():
    latents = draw()
    tokens, values = latents.reshape(-1, 5), channels.channel_stats(latents)
    np.testing.assert_allclose(values["mean"], tokens.mean(axis=0))
    np.testing.assert_allclose(values["std"], tokens.std(axis=0))
    np.testing.assert_allclose(values["skewness"], stats.skew(tokens))
    np.testing.assert_allclose(values["kurtosis"], stats.kurtosis(tokens))
    np.testing.assert_array_equal(values["median"], np.median(tokens, axis=0))
    np.testing.assert_array_equal([values["min"], values["max"]], [tokens.min(axis=0), tokens.max(axis=0)])


def test_a_collapsed_channel_is_named_and_has_no_shape():
    latents = draw().astype(np.float32)
    latents[..., 2] = 1e4 + 1e-3 * np.random.default_rng(1).normal(size=latents.shape[:3])  # float32's rounding
    assert channels.collapsed(latents).tolist() == [False, False, True, False, False]
    values = channels.channel_stats(latents)
    assert np.isnan(values["skewness"]).tolist() == [False, False, True, False, False]
    assert np.isfinite(values["std"]).all()


def test_dimensions_of_known_covariances():
    noise = np.random.default_rng(0).normal(size=(64, 16, 16, 4))
    known = ([1, 1, 1, 1], 4, 4), ([1, 0, 0, 0], 1, 1), ([1, 1, 0, 0], 2, 2), ([3, 1, 0, 0], None, 100 / 82)
    for scales, rank, ratio in known:
        shares = channels.variance_shares(noise * scales)
        assert shares.sum() == pytest.approx(1) and (np.diff(shares) <= 0).all()
        assert channels.participation_ratio(shares) == pytest.approx(ratio, rel=0.02)
        if rank:
            assert channels.effective_rank(shares) == pytest.approx(rank, rel=0.02)


def test_dimensions_do_not_change_with_a_rotation_of_the_channels_nor_scale():
    latents = draw()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    np.testing.assert_allclose(channels.variance_shares(7 * latents @ rotation), channels.variance_shares(latents), rtol=1e-9)


def test_nothing_varies():
    shares = channels.variance_shares(np.full((2, 4, 4, 3), 5.0))
    assert np.isnan(shares).all() and np.isnan(channels.effective_rank(shares))
    assert np.isnan(channels.participation_ratio(shares))
    edges, counts = channels.histograms(np.full((2, 4, 4, 3), 5.0), bins=4)
    assert counts.sum(axis=1).tolist() == [1, 1, 1] and edges[0] == 4.5


def test_histograms():
    latents = draw((8, 8, 8, 3))
    edges, counts = channels.histograms(latents, bins=10)
    assert edges.shape == (11,) and counts.shape == (3, 10)
    assert (counts.sum(axis=1) > 0.99).all() and counts[0, 0] > counts[2, 0]


def test_errors():
    for function in (channels.channel_stats, channels.collapsed, channels.variance_shares, channels.histograms):
        with pytest.raises(ValueError, match=r"shape \[4, 4, 3\]; allowed: \[B, h, w, C\]"):
            function(np.zeros((4, 4, 3)))
