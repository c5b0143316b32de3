"""Representation alignment (REPA), and iREPA's normalisation of its targets.

Reference: REPA (arXiv 2410.06940) equation 8; REPA-E's `models/sit.py`; iREPA (arXiv 2512.10794).
"""

import jax
import jax.numpy as jnp

SCHEDULES = ("constant", "linear", "cosine")


def unit(x):
    """Vectors of length one along the last axis, float32; a zero vector stays zero."""
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
    losses = [-jnp.mean(jnp.sum(unit(p) * unit(t), axis=-1)) for p, t in zip(projections, targets)]
    return sum(losses) / len(losses)


def schedule_factor(step, shape, end):
    """Factor of the alignment's weight: 1 at the first step, 0 from step `end` on.

    Early stop (HASTE, arXiv 2505.16792) is 'constant'. The alignment is computed after its end, too: one program serves all.

    Args:
      step: int32 scalar.
      shape: 'constant' until the end, or 'linear' or 'cosine' decay towards it.
      end: step.

    Returns:
      float32 scalar.

    Raises:
      ValueError: for another shape.
    """
    if shape not in SCHEDULES:
        raise ValueError(f"schedule {shape!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    progress = jnp.minimum(step / end, 1.0)
    decay = {"constant": jnp.float32(progress < 1), "linear": 1 - progress, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress))}
    return decay[shape]
