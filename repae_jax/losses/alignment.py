"""Representation alignment (REPA).

Reference: REPA (arXiv 2410.06940) equation 8; REPA-E's `models/sit.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SCHEDULES = ("constant", "linear", "cosine")


def unit(x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """Returns float32 vectors of length one along the last axis; a zero vector stays zero."""
    # float32, and torch's clamp of the norm: half precision here is the known cause of collapsed runs
    x = x.astype(jnp.float32)
    # the norm is clamped before the root, so that a zero vector has a zero gradient and not NaN
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def alignment_loss(
    projections: tuple[Float[Array, "B T F"], ...], targets: tuple[Float[Array, "B T F"], ...]
) -> Float[Array, ""]:
    """Returns the negative cosine similarity in [-1, 1], mean over encoders, batch and tokens.

    Args:
      projections: one array per encoder.
      targets: the encoders' tokens.

    Raises:
      ValueError: if the shapes disagree.
    """
    shapes = [p.shape for p in projections], [t.shape for t in targets]
    if shapes[0] != shapes[1]:
        raise ValueError(f"projections {shapes[0]} and targets {shapes[1]} differ: [B, T, F] per encoder must agree")
    losses = [-jnp.mean(jnp.sum(unit(p) * unit(t), axis=-1)) for p, t in zip(projections, targets)]
    return jnp.asarray(sum(losses) / len(losses))


def schedule_factor(step, shape: str, end: int) -> Float[Array, ""]:
    """Returns the factor of the alignment's weight: 1 at the first step, 0 from step `end` on.

    Early stop (HASTE, arXiv 2505.16792) is 'constant'. The alignment is computed after its end, too: one program serves all.

    Args:
      step: int32 scalar.
      shape: 'constant' until the end, or 'linear' or 'cosine' decay towards it; ValueError for another.
    """
    if shape not in SCHEDULES:
        raise ValueError(f"schedule {shape!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    progress = jnp.minimum(step / end, 1.0)
    decay = {"constant": jnp.float32(progress < 1), "linear": 1 - progress, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress))}
    return decay[shape]
