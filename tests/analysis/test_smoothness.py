import numpy as np
import pytest

from repae_jax.analysis.smoothness import spatial_variance, total_variation


def test_by_hand():
    plane = np.array([[0.0, 2.0], [4.0, 6.0]])  # mean 3: squares 9, 1, 1, 9; differences 4, 4 down and 2, 2 across
    latents = np.stack([plane, np.ones((2, 2))], axis=-1)[None]  # a second channel without any
    assert spatial_variance(latents) == pytest.approx(5 / 2)
    assert total_variation(latents) == pytest.approx(12 / 2)
    two = np.concatenate([latents, 0 * latents])  # and an image without any
    assert spatial_variance(two) == pytest.approx(5 / 4)
    assert total_variation(two) == pytest.approx(12 / 4)


def test_against_loops():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    variation, variances = [], []
    for b in range(2):
        for c in range(4):
            total = 0.0
            for i in range(3):
                for j in range(5):
                    total += abs(x[b, i + 1, j, c] - x[b, i, j, c]) if i + 1 < 3 else 0.0
                    total += abs(x[b, i, j + 1, c] - x[b, i, j, c]) if j + 1 < 5 else 0.0
            variation.append(total)
            variances.append(np.mean((x[b, :, :, c] - x[b, :, :, c].mean()) ** 2))
    assert total_variation(x) == pytest.approx(np.mean(variation), rel=1e-5)
    assert spatial_variance(x) == pytest.approx(np.mean(variances), rel=1e-5)


def test_scale_and_offset():
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 3))
    assert spatial_variance(3 * x + 7) == pytest.approx(9 * float(spatial_variance(x)), rel=1e-4)
    assert total_variation(3 * x + 7) == pytest.approx(3 * float(total_variation(x)), rel=1e-4)


def test_white_noise_as_in_the_paper_s_table():
    """The averaging was read off this: of SD-VAE's 32 x 32 positions with its variance, noise has a little more than 6627."""
    x = np.sqrt(17.06) * np.random.default_rng(2).normal(size=(8, 32, 32, 4))
    assert 1 < total_variation(x) / 6627.35 < 1.5


@pytest.mark.parametrize("shape", [(4, 4, 3), (0, 4, 4, 3)])
def test_errors(shape):
    for measure in (spatial_variance, total_variation):
        with pytest.raises(ValueError, match=r"allowed: \[B, h, w, C\]"):
            measure(np.zeros(shape))
