"""Reconstruction terms of the VAE loss. Images are in [-1, 1]; every reduction is a mean over the batch.

Reference: REPA-E's `loss/losses.py`. The paper's text says MSE where its code trains with L1.
"""

import jax.numpy as jnp


def l1(images, recon):
    """Mean absolute error over batch, pixels and channels."""
    return jnp.mean(jnp.abs(images - recon))


def l2(images, recon):
    """Mean squared error over batch, pixels and channels."""
    return jnp.mean(jnp.square(images - recon))


def perceptual(lpips_fn, images, recon, input_range):
    """Mean LPIPS.

    Args:
      lpips_fn: (images, others) in [-1, 1] -> [B].
      images: [B, H, W, 3] in [-1, 1].
      recon: the same shape.
      input_range: the range the perceptual network takes its input to have. (-1, 1) is correct scaling; (0, 1) maps
        x -> 2x - 1 first, as the published code did in April 2025, with which all released weights were trained.

    Returns:
      float32 scalar.
    """
    low, high = input_range

    def rescale(x):
        return x * (2.0 / (high - low)) - (high + low) / (high - low)

    return jnp.mean(lpips_fn(rescale(images), rescale(recon)))


def kl(posterior):
    """KL(q || N(0, 1)) in nats: summed over positions and channels, mean over the batch."""
    return jnp.mean(posterior.kl())
