"""Representation alignment (REPA).

Reference: REPA (arXiv 2410.06940) equation 8; REPA-E's `models/sit.py`.
"""

import jax
import jax.numpy as jnp


def _unit(x):
    # float32, and torch's clamp of the norm: half precision here is the known cause of collapsed runs
    x = x.astype(jnp.float32)
    # the norm is clamped before the root, so that a zero vector has a zero gradient and not NaN
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def alignment_loss(projections, targets):
    """Negative cosine similarity.

    Args:
      projections: tuple of [B, T, F], one per encoder.
      targets: tuple of the same shapes.

    Returns:
      float32 scalar in [-1, 1], mean over encoders, batch and tokens.

    Raises:
      ValueError: if the shapes disagree, naming them.
    """
    shapes = [p.shape for p in projections], [t.shape for t in targets]
    if shapes[0] != shapes[1]:
        raise ValueError(f"projections {shapes[0]} and targets {shapes[1]} differ: [B, T, F] per encoder must agree")
    losses = [-jnp.mean(jnp.sum(_unit(p) * _unit(t), axis=-1)) for p, t in zip(projections, targets)]
    return sum(losses) / len(losses)
