"""Whether encoding and a transform of the image commute, as EQ-VAE asks of a VAE (arXiv 2502.09509, section 3).

Two sides are measured. In the latents, E(T x) against T E(x), relative to how much E(T x) varies, so that VAEs compare,
whatever their latents' scale. In pixels, what the decoder makes of T E(x) against T x; EQ-VAE reports the FID of those images.
Even for a VAE without fault resampled pixels are not a resampled latent: compare with the same transform of another VAE, and in
pixels with the reconstruction of the image as it is.
"""

import jax.numpy as jnp
import numpy as np


def compare(encode, decode, transform, images, latents):
    """Both sides of one transform, for a batch; to be jitted.

    Args:
      encode: images [B, H, W, 3] of any size -> latents [B, h, w, C].
      decode: latents -> images.
      transform: of images and of latents, such as a rotation.
      images: float [B, H, W, 3] in [-1, 1].
      latents: encode(images).

    Returns:
      E(T x) and T E(x), [B, h', w', C] each; PSNR [B] in dB and mean absolute error [B] of D(T E(x)) against T x.
    """
    expected, transformed = transform(images), transform(latents)
    recon = decode(transformed)
    return encode(expected), transformed, psnr(expected, recon), jnp.mean(jnp.abs(expected - recon.clip(-1, 1)), axis=(1, 2, 3))


def psnr(expected, actual):
    """Peak signal-to-noise ratio of each image.

    Args:
      expected: float [B, H, W, 3] in [-1, 1].
      actual: the same shape, clipped to that range here.

    Returns:
      float32 [B] in dB, of a range of 2; at most 100.
    """
    error = jnp.mean(jnp.square(expected - actual.clip(-1, 1)), axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(error, 4e-10))


def difference_sums(encoded, transformed):
    """What `relative_error` needs of a batch; those of several batches are added.

    Args:
      encoded: E(T x), float [B, h, w, C].
      transformed: T E(x), of the same shape.

    Returns:
      float64 [4, C]: how many values, sums of E(T x), of its squares, and of the squared differences.

    Raises:
      ValueError: if the shapes differ.
    """
    encoded, transformed = (np.asarray(x, np.float64) for x in (encoded, transformed))
    if encoded.shape != transformed.shape or encoded.ndim != 4:
        raise ValueError(f"E(T x) is {list(encoded.shape)}, T E(x) {list(transformed.shape)}; allowed: equal [B, h, w, C]")
    terms = np.ones_like(encoded), encoded, encoded**2, (encoded - transformed) ** 2
    return np.stack([term.sum(axis=(0, 1, 2)) for term in terms])


def relative_error(sums):
    """Root of the mean squared |E(T x) - T E(x)| over the variance of E(T x), both summed over the channels.

    Args:
      sums: float64 [4, C], see `difference_sums`.

    Returns:
      float >= 0: 0 commutes, about sqrt(2) is unrelated; nan if E(T x) is the same everywhere.
    """
    count, total, squares, differences = sums
    spread = (squares - total**2 / count).sum()
    return float(np.sqrt(differences.sum() / spread)) if spread > 1e-12 * squares.sum() else np.nan
