"""Roughness of latents over positions: spatial variance and total variation, as REPA-E's appendix A compares VAEs.

Both are of the latents as the VAE gives them, not normalized, and so grow with their scale. The paper says "mean per-channel
variance across spatial dimensions" and does not say how total variation is averaged; summed over positions and averaged over
channels and images, its numbers for SD-VAE (17.06 and 6627) fit each other.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def spatial_variance(latents: Float[Array, "B h w C"]) -> Float[Array, ""]:
    """Computes the variance over the positions of each image and channel, averaged over both; ValueError for other shapes."""
    return jnp.mean(jnp.var(_in_float32(latents), axis=(1, 2)))


def total_variation(latents: Float[Array, "B h w C"]) -> Float[Array, ""]:
    """Computes the sum over positions of absolute differences of neighbors, both ways, averaged over channels and images."""
    latents = _in_float32(latents)
    rows, columns = (jnp.sum(jnp.abs(jnp.diff(latents, axis=axis)), axis=(1, 2)) for axis in (1, 2))
    return jnp.mean(rows + columns)


def _in_float32(latents: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    latents = jnp.asarray(latents, jnp.float32)
    if latents.ndim != 4 or not latents.size:
        raise ValueError(f"latents have shape {list(latents.shape)}; allowed: [B, h, w, C], none of them 0")
    return latents
