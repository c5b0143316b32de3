"""Equivariance of a VAE: whether encoding and a transform of the image commute (EQ-VAE, arXiv 2502.09509, section 3).

Two sides are measured. In the latents, E(T x) against T E(x), relative to how much E(T x) varies, so that VAEs compare,
whatever their latents' scale. In pixels, the decoded T E(x) against T x; EQ-VAE reports the FID of those images.
Even for a VAE without fault resampled pixels are not a resampled latent: compare with the same transform of another VAE, and in
pixels with the reconstruction of the image as it is.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Images = Float[Array, "B H W 3"]
Latents = Float[Array, "B h w C"]


def compare(
    encode: Callable[[Images], Latents], decode: Callable[[Latents], Images], transform: Callable[[Array], Array],
    images: Images, latents: Latents,
) -> tuple[Latents, Latents, Float[Array, " B"], Float[Array, " B"]]:
    """Returns E(T x), T E(x), and the PSNR in dB and mean absolute error of D(T E(x)) against T x; images are in [-1, 1]."""
    expected, transformed = transform(images), transform(latents)
    recon = decode(transformed)
    return encode(expected), transformed, psnr(expected, recon), jnp.mean(jnp.abs(expected - recon.clip(-1, 1)), axis=(1, 2, 3))


def psnr(expected: Images, actual: Images) -> Float[Array, " B"]:
    """Computes the peak signal-to-noise ratio of each image, at most 100 dB, for images in [-1, 1]; `actual` is clipped."""
    error = jnp.mean(jnp.square(expected - actual.clip(-1, 1)), axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(error, 4e-10))


def difference_sums(
    encoded: Float[np.ndarray, "B h w C"], transformed: Float[np.ndarray, "B h w C"]
) -> Float[np.ndarray, "4 C"]:
    """Computes the sums over a batch that `relative_error` needs, in float64; sums of several batches are added.

    They are the number of values, sums of E(T x), of its squares, and of the squared differences from T E(x).
    """
    encoded, transformed = (np.asarray(x, np.float64) for x in (encoded, transformed))
    if encoded.shape != transformed.shape or encoded.ndim != 4:
        raise ValueError(f"E(T x) is {list(encoded.shape)}, T E(x) {list(transformed.shape)}; allowed: equal [B, h, w, C]")
    terms = np.ones_like(encoded), encoded, encoded**2, (encoded - transformed) ** 2
    return np.stack([term.sum(axis=(0, 1, 2)) for term in terms])


def relative_error(sums: Float[np.ndarray, "4 C"]) -> float:
    """Computes the root of the mean squared |E(T x) - T E(x)| over the variance of E(T x), both summed over the channels.

    It is 0 if the transform and encoding commute, about sqrt(2) if both are unrelated; nan if E(T x) is the same everywhere.
    """
    count, total, squares, differences = sums
    spread = (squares - total**2 / count).sum()
    return float(np.sqrt(differences.sum() / spread)) if spread > 1e-12 * squares.sum() else np.nan
