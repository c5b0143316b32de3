"""Reconstruction terms of the VAE loss. Images are in [-1, 1]; every reduction is a mean over the batch.

Reference: REPA-E's `loss/losses.py`. The paper's text says MSE where its code trains with L1.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Images = Float[Array, "B H W 3"]
Scalar = Float[Array, ""]


def l1(images: Images, recon: Images) -> Scalar:
    """Returns the mean absolute error over batch, pixels and channels."""
    return jnp.mean(jnp.abs(images - recon))


def l2(images: Images, recon: Images) -> Scalar:
    """Returns the mean squared error over batch, pixels and channels."""
    return jnp.mean(jnp.square(images - recon))


def perceptual(lpips_fn: Callable, images: Images, recon: Images, input_range: tuple[float, float]) -> Scalar:
    """Returns the mean LPIPS.

    Args:
      lpips_fn: (images, others) in [-1, 1] -> [B].
      images, recon: in [-1, 1].
      input_range: the range the perceptual network takes its input to have. (-1, 1) is correct scaling; (0, 1) maps
        x -> 2x - 1 first, as the published code did in April 2025, with which all released weights were trained.
    """
    low, high = input_range

    def rescale(x):
        return x * (2.0 / (high - low)) - (high + low) / (high - low)

    return jnp.mean(lpips_fn(rescale(images), rescale(recon)))


def kl(posterior) -> Scalar:
    """Returns KL(q || N(0, 1)) in nats, summed over positions and channels, mean over the batch."""
    return jnp.mean(posterior.kl())
