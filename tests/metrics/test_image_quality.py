"""PSNR and SSIM against scikit-image: stored values, and live ones where it is installed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import reference

from repae_jax.images import to_float
from repae_jax.metrics import image_quality
from repae_jax.metrics.image_quality import WINDOW, psnr

# not from REPAE_GOLDEN_DIR, which holds the published code's values
GOLDEN = Path(__file__).parents[1] / "golden" / "image_quality.npz"
SIZES = ("11x11", "16x16", "23x37", "64x64")
ATOL = 1e-5  # dB, and of SSIM's 1

ssim = jax.jit(image_quality.ssim, static_argnums=2)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def pairs(shape, seed=0):
    """Two uint8 images [2, *shape] each: noise, and a ramp; with noise on them."""
    rng = np.random.default_rng(seed)
    ramp = np.broadcast_to(np.linspace(0, 255, shape[1])[:, None], shape)
    images = np.stack([rng.integers(0, 256, shape), ramp]).astype(np.uint8)
    return images, (images + rng.normal(0, 12, images.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_golden(golden, size, record_property):
    images, others = golden[f"{size}/images"], golden[f"{size}/others"]
    results = {
        "psnr": psnr(images, others),
        "ssim": ssim(images.astype(np.float32), others.astype(np.float32), 255),
        "ssim_signed": ssim(to_float(images), to_float(others), 2),
    }
    for name, values in results.items():
        assert values.shape == (4,) and values.dtype == np.float32
        error = np.abs(np.float64(values) - golden[f"{size}/{name}"]).max()
        record_property(name, float(error))
        assert error <= ATOL, f"{name}: {error:.1e}"


def test_golden_file_tells_how_it_was_made():
    about = json.loads(GOLDEN.with_suffix(".json").read_text())
    assert about["made_with"]["scikit-image"] and "use_sample_covariance=False" in about["ssim"]


@pytest.mark.parametrize("shape", [(11, 12, 3), (40, 24, 3), (128, 128, 3), (32, 32, 1)])
def test_live(shape):
    metrics = pytest.importorskip("skimage.metrics")
    images, others = pairs(shape)
    for a, b, decibels, similarity in zip(
        images, others, psnr(images, others), ssim(images.astype(np.float32), others.astype(np.float32), 255)
    ):
        assert decibels == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=255), abs=ATOL)
        expected = metrics.structural_similarity(
            a.astype(np.float64), b.astype(np.float64), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            channel_axis=-1, data_range=255,
        )  # fmt: skip
        assert similarity == pytest.approx(expected, abs=ATOL)


def test_equal_images():
    images, _ = pairs((16, 16, 3))
    assert np.isposinf(psnr(images, images)).all()
    np.testing.assert_allclose(ssim(to_float(images), to_float(images), 2), 1, rtol=1e-6)


def test_psnr_by_hand():
    """Errors of 1 everywhere, of 255 everywhere, and of 3 in one channel."""
    zeros = np.zeros((3, 5, 7, 3), np.uint8)
    others = zeros.copy()
    others[0], others[1], others[2, ..., 1] = 1, 255, 3
    np.testing.assert_allclose(psnr(zeros, others), [20 * np.log10(255), 0, 20 * np.log10(255) - 10 * np.log10(3)], atol=1e-5)


def test_large_errors_of_large_images_do_not_overflow():
    black, white = np.zeros((1, 512, 512, 3), np.uint8), np.full((1, 512, 512, 3), 255, np.uint8)
    white[0, 0, 0, 0] = 0
    expected = -10 * np.log10(1 - 1 / white.size)
    assert float(psnr(black, white)[0]) == pytest.approx(expected, abs=ATOL)


def test_symmetric_and_each_image_by_itself():
    images, others = pairs((24, 20, 3))
    x, y = to_float(images), to_float(others)
    np.testing.assert_allclose(ssim(x, y, 2), ssim(y, x, 2), rtol=1e-5)
    np.testing.assert_array_equal(psnr(images, others), psnr(others, images))
    for i in range(2):
        np.testing.assert_allclose(ssim(x[i : i + 1], y[i : i + 1], 2)[0], ssim(x, y, 2)[i], rtol=1e-5)


def test_float64_stays_float64(golden):
    with jax.enable_x64(True):
        images, others = golden["23x37/images"].astype(np.float64), golden["23x37/others"].astype(np.float64)
        values = ssim(images, others, 255)
        assert values.dtype == np.float64
        assert reference.relative_error(values, golden["23x37/ssim"]) < 1e-12


def test_nan_is_not_hidden():
    images = np.zeros((2, WINDOW, WINDOW, 3), np.float32)
    others = images.copy()
    others[1, 5, 5, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(ssim(images, others, 2)), [False, True])


def test_errors():
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    floats = to_float(pixels)
    with pytest.raises(ValueError, match="dtype float32; allowed: uint8"):
        psnr(pixels, floats)
    with pytest.raises(ValueError, match="dtype uint8; allowed: a float type"):
        ssim(floats, pixels, 2)
    for function in (psnr, lambda a, b: ssim(a, b, 255)):
        with pytest.raises(ValueError, match=r"shapes \[1, 16, 16, 3\] and \[1, 8, 16, 3\]"):
            function(pixels, pixels[:, :8])
        with pytest.raises(ValueError, match=r"allowed: one shape \[B, H, W, C\]"):
            function(pixels[0], pixels[0])
    with pytest.raises(ValueError, match="images have 16 x 10 pixels; SSIM needs at least 11 x 11"):
        ssim(floats[:, :, :10], floats[:, :, :10], 2)
    with pytest.raises(ValueError, match="data_range is 0"):
        ssim(floats, floats, 0)
