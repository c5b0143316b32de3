"""Similarity of an image and its reconstruction, pixel by pixel (PSNR) and window by window (SSIM)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

SIGMA, RADIUS = 1.5, 5  # pixels, of Wang et al.'s window: a Gaussian, cut to 11 x 11
WINDOW = 2 * RADIUS + 1


def psnr(images: UInt8[Array, "B H W C"], others: UInt8[Array, "B H W C"]) -> Float[Array, " B"]:
    """Computes the peak signal-to-noise ratio of each pair in dB: 10 log10(255^2 / mean squared error).

    The mean is over pixels and channels; infinite for equal images. ValueError for another dtype or shape.
    """
    _check_shapes(images, others)
    for array in (images, others):
        if array.dtype != np.uint8:
            raise ValueError(f"images have dtype {array.dtype}; allowed: uint8 with values 0..255, as saved to disk")
    # Rows are summed as integers: a float32 sum over all pixels would lose digits.
    squares = jnp.square(jnp.asarray(images, jnp.int32) - jnp.asarray(others, jnp.int32))
    rows = squares.sum(axis=(2, 3)).astype(jnp.float32)
    mean = rows.mean(axis=1) / (images.shape[2] * images.shape[3])
    return 20 * jnp.log10(jnp.float32(255)) - 10 * jnp.log10(mean)


def ssim(images: Float[Array, "B H W C"], others: Float[Array, "B H W C"], data_range: float) -> Float[Array, " B"]:
    """Computes the structural similarity of each pair, over a Gaussian window, each channel by itself.

    Only windows that lie inside the image count, as in the published definition and in scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`. So did torchmetrics' up to its pull
    request 2721 of September 2024; since then it counts windows over the border, too, where the image is mirrored.

    Args:
      images, others: floats, H and W at least WINDOW; any dtype but float64 is computed in float32.
      data_range: largest minus smallest value that images can have: 2 for [-1, 1], 255 for pixels. Values are not clipped.
        Where zero lies matters, too: the definition has black there; in [-1, 1] errors weigh most in mid-gray.

    Returns:
      The mean over positions and channels, at most 1. ValueError for integers, small images, or shapes that differ.

    Reference: Wang et al. 2004, 'Image quality assessment: from error visibility to structural similarity', eq. 13, with
      K1 = 0.01 and K2 = 0.03.
    """
    _check_shapes(images, others)
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(f"images have {images.shape[1]} x {images.shape[2]} pixels; SSIM needs at least {WINDOW} x {WINDOW}")
    if not data_range > 0:
        raise ValueError(f"data_range is {data_range}; allowed: a positive number, such as 2 for images in [-1, 1]")
    for array in (images, others):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"images have dtype {array.dtype}; allowed: a float type, and data_range to go with it")
    dtype = jnp.promote_types(jnp.promote_types(images.dtype, others.dtype), jnp.float32)
    x, y = (jnp.asarray(array, dtype) for array in (images, others))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    # A shift changes no variance, but small numbers lose fewer digits in E[x^2] - E[x]^2.
    shift = jnp.mean(x, axis=(1, 2), keepdims=True)
    a, b = x - shift, y - shift
    blurred = _blur(jnp.concatenate([a, b, a * a + b * b, a * b], axis=-1))
    mean_a, mean_b, squares, products = jnp.split(blurred, 4, axis=-1)
    variances = squares - jnp.square(mean_a) - jnp.square(mean_b)
    covariance = products - mean_a * mean_b
    mean_x, mean_y = mean_a + shift, mean_b + shift
    luminance = (2 * mean_x * mean_y + c1) / (jnp.square(mean_x) + jnp.square(mean_y) + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (variances + c2), axis=(1, 2, 3))


def _blur(x: Float[Array, "B H W C"]) -> Float[Array, "B H-10 W-10 C"]:
    """Computes Gaussian means over the windows inside the image."""
    # Sums of shifted images, because convolutions on accelerators round to fewer digits than float32 has.
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    weights /= weights.sum()
    height, width, zero = x.shape[1] - 2 * RADIUS, x.shape[2] - 2 * RADIUS, jnp.zeros((), x.dtype)
    x = sum((float(weight) * x[:, i : i + height] for i, weight in enumerate(weights)), zero)
    return sum((float(weight) * x[:, :, i : i + width] for i, weight in enumerate(weights)), zero)


def _check_shapes(images: Array, others: Array) -> None:
    if images.shape != others.shape or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"images have shapes {list(images.shape)} and {list(others.shape)}; allowed: one shape [B, H, W, C], without zeros"
        )
