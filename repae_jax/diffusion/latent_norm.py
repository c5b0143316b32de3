"""The batch norm between VAE and SiT, as plain statistics: no affine parameters.

Training normalises with `EPSILON`; de-normalising and export use the statistics without it, as the published code does.
Reference: REPA-E (arXiv 2504.10483) section 3.2; its `models/sit.py` (`self.bn`).
"""

import jax
import jax.numpy as jnp

EPSILON = 1e-4


def normalize(latents, stats):
    """(latents - mean) / sqrt(var + 1e-4), in float32.

    Args:
      latents: [B, h, w, C], un-normalised.
      stats: ChannelStats, running or of the batch.

    Returns:
      float32 [B, h, w, C].
    """
    return (latents.astype(jnp.float32) - stats.mean) * jax.lax.rsqrt(stats.var + EPSILON)


def denormalize(z, stats):
    """z * sqrt(var) + mean, without epsilon (published sampling). z [B, h, w, C] -> latents [B, h, w, C]."""
    return z * jnp.sqrt(stats.var) + stats.mean
