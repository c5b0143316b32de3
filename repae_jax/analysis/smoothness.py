"""How rough latents are over positions: spatial variance and total variation, as REPA-E's appendix A compares VAEs.

Both are of the latents as the VAE gives them, not normalised, and so grow with their scale. The paper says "mean per-channel
variance across spatial dimensions" and does not say how total variation is averaged; summed over positions and averaged over
channels and images, its numbers for SD-VAE (17.06 and 6627) fit each other.
"""

import jax.numpy as jnp


def spatial_variance(latents):
    """Variance over the positions of each image and channel, averaged over both.

    Args:
      latents: [B, h, w, C].

    Returns:
      float32 scalar.

    Raises:
      ValueError: if the latents are not [B, h, w, C].
    """
    return jnp.mean(jnp.var(_checked(latents), axis=(1, 2)))


def total_variation(latents):
    """Sum over positions of the absolute differences of neighbours in both directions, averaged over channels and images.

    Args:
      latents: [B, h, w, C].

    Returns:
      float32 scalar.

    Raises:
      ValueError: if the latents are not [B, h, w, C].
    """
    latents = _checked(latents)
    per_direction = [jnp.sum(jnp.abs(jnp.diff(latents, axis=axis)), axis=(1, 2)) for axis in (1, 2)]
    return jnp.mean(sum(per_direction))


def _checked(latents):
    latents = jnp.asarray(latents, jnp.float32)
    if latents.ndim != 4 or not latents.size:
        raise ValueError(f"latents have shape {list(latents.shape)}; allowed: [B, h, w, C], none of them 0")
    return latents
