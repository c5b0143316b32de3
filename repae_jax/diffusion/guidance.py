"""Classifier-free guidance of a velocity, and the time segments in which it applies."""

import jax.numpy as jnp
import numpy as np


def guide(velocity_fn, labels, null_label, scale, channels):
    """Guided velocity v_null + scale * (v_label - v_null), on the first channels; v_label on the others.

    Exact for the SDE sampler too: its drift is affine in the velocity and the two weights sum to one. DiT's noise is guided
    alike, its variance not.

    Args:
      velocity_fn: (z_t [B, ...], t [B], labels [B]) -> velocity [B, ..., >= channels].
      labels: int [B].
      null_label: label of "no class".
      scale: guidance scale; 1 is no guidance.
      channels: how many are guided.

    Returns:
      (z_t, t) -> velocity; one network call on the doubled batch.
    """
    doubled = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def guided(z_t, t):
        v = velocity_fn(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), doubled)
        conditional, unconditional = jnp.split(v, 2)
        difference = (conditional - unconditional)[..., :channels]
        return jnp.concatenate([unconditional[..., :channels] + scale * difference, conditional[..., channels:]], axis=-1)

    return guided


def segments(times, interval, guided, plain):
    """Split a time grid into stretches with and without guidance, decided by each step's starting time.

    Args:
      times: decreasing numpy [n + 1].
      interval: (low, high), both included; guidance applies to steps starting at low <= t <= high.
      guided: velocity function inside the interval.
      plain: velocity function outside it.

    Returns:
      list of (times of the stretch, velocity function); a stretch of k steps has k + 1 times.
    """
    low, high = interval
    inside = [low <= t <= high for t in times[:-1]]
    cuts = [0, *(i for i in range(1, len(inside)) if inside[i] != inside[i - 1]), len(inside)]
    return [
        (np.asarray(times[start : stop + 1]), guided if inside[start] else plain) for start, stop in zip(cuts[:-1], cuts[1:])
    ]
