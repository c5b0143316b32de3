import numpy as np
import pytest

from repae_jax.analysis import spectrum


def naive_dct(plane):
    """Coefficients of one block by the definition."""
    n = len(plane)
    matrix = np.zeros((n, n))
    for u in range(n):
        for v in range(n):
            for i in range(n):
                for j in range(n):
                    matrix[u, v] += plane[i, j] * np.cos(np.pi * (i + 0.5) * u / n) * np.cos(np.pi * (j + 0.5) * v / n)
            matrix[u, v] *= (np.sqrt(1 / n) if u == 0 else np.sqrt(2 / n)) * (np.sqrt(1 / n) if v == 0 else np.sqrt(2 / n))
    return matrix


def test_zigzag_is_jpeg_s():
    order = [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14]
    assert [8 * u + v for u, v in spectrum.zigzag(8)][:30] == order
    assert spectrum.zigzag(1).tolist() == [[0, 0]]


def test_against_the_definition():
    x = np.random.default_rng(0).normal(size=(2, 8, 13, 3)) + 1  # the last column is in no block
    amplitudes, ratios = np.zeros((16, 3)), np.zeros((16, 3))
    for b in range(2):
        for top in (0, 4):
            for left in (0, 4, 8):
                for c in range(3):
                    coefficients = naive_dct(x[b, top : top + 4, left : left + 4, c])
                    in_order = np.abs([coefficients[u, v] for u, v in spectrum.zigzag(4)])
                    amplitudes[:, c] += in_order / 12
                    ratios[:, c] += in_order / in_order[0] / 12
    np.testing.assert_allclose(spectrum.mean_amplitudes(x, 4), amplitudes, rtol=1e-10)
    np.testing.assert_allclose(spectrum.mean_ratios(x, 4), ratios, rtol=1e-10)
    expected = np.mean(amplitudes / amplitudes[0], axis=1)
    np.testing.assert_allclose(spectrum.relative_spectrum(amplitudes), expected)


def test_a_constant_image_has_no_frequencies():
    amplitudes = spectrum.mean_amplitudes(np.full((2, 8, 8, 3), 0.5), 8)
    np.testing.assert_allclose(spectrum.relative_spectrum(amplitudes), np.eye(64)[0], atol=1e-12)


def test_one_cosine_is_one_frequency():
    wave = np.cos(np.pi * (np.arange(8) + 0.5) * 3 / 8)
    x = 1 + np.tile(wave[None, None, :, None], (1, 8, 1, 1))  # along columns: u = 0, v = 3
    relative = spectrum.relative_spectrum(spectrum.mean_amplitudes(x, 8))
    at = spectrum.zigzag(8).tolist().index([0, 3])
    assert relative[at] == pytest.approx(np.sqrt(0.5)) and np.delete(relative, [0, at]).max() < 1e-12


def test_scale_free_and_flat_for_noise():
    noise = np.random.default_rng(0).normal(size=(64, 32, 32, 2))
    relative = spectrum.relative_spectrum(spectrum.mean_amplitudes(noise, 8))
    np.testing.assert_allclose(relative, 1, atol=0.1)
    np.testing.assert_allclose(spectrum.relative_spectrum(spectrum.mean_amplitudes(-5 * noise, 8)), relative)
    assert spectrum.high_frequency_share(spectrum.mean_amplitudes(noise, 8)) == pytest.approx(32 / 63, abs=0.02)


def test_nothing_there():
    zero = np.zeros((1, 4, 4, 2))
    assert np.isnan(spectrum.relative_spectrum(spectrum.mean_amplitudes(zero, 4))).all()
    assert np.isnan(spectrum.mean_ratios(zero, 4)).all() and np.isnan(spectrum.high_frequency_share(np.zeros((16, 2))))
    half = np.concatenate([zero + 1, zero])  # blocks that are 0 have no ratio
    np.testing.assert_allclose(spectrum.mean_ratios(half, 4)[:, 0], np.eye(16)[0], atol=1e-12)


def test_errors():
    for measure in (spectrum.mean_amplitudes, spectrum.mean_ratios):
        with pytest.raises(ValueError, match=r"blocks of 8 x 8 in shape \[1, 4, 16, 3\]"):
            measure(np.zeros((1, 4, 16, 3)), 8)
