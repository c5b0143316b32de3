"""The batch norm between VAE and SiT, as plain statistics: no affine parameters.

Training normalizes with `EPSILON`; de-normalizing and export use the statistics without it, as the published code does.
Reference: REPA-E (arXiv 2504.10483) section 3.2; its `models/sit.py` (`self.bn`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-4


def normalize(latents: Float[Array, "B h w C"], stats: Any) -> Float[Array, "B h w C"]:
    """Returns (latents - mean) / sqrt(var + 1e-4) in float32; stats are ChannelStats, running or the batch's own."""
    return (latents.astype(jnp.float32) - stats.mean) * jax.lax.rsqrt(stats.var + EPSILON)


def denormalize(z: Float[Array, "B h w C"], stats: Any) -> Float[Array, "B h w C"]:
    """Returns the latents z * sqrt(var) + mean, without epsilon (published sampling)."""
    return z * jnp.sqrt(stats.var) + stats.mean
