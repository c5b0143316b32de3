"""Classifier-free guidance of a network's output, and the segments of time in which it applies."""

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def guide(output_fn: Callable, labels: Int[Array, " B"], null_label: int, scale: float, channels: int) -> Callable:
    """Returns an output function (z_t, t) with guidance, at the price of a doubled batch in each network call.

    It gives v_null + scale * (v_label - v_null) in the first channels, v_label in the others. This is exact for the SDE sampler
    too: its drift is affine in the velocity and the two weights sum to one. DiT's noise is guided alike, its variance not.

    Args:
      output_fn: (z_t [B, ...], t [B], labels [B]) -> output [B, ..., >= channels].
      labels: the classes to guide toward.
      null_label: label of "no class".
      scale: 1 is no guidance.
      channels: how many, the first ones, are guided.
    """
    doubled = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def guided(z_t, t):
        output = output_fn(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), doubled)
        conditional, unconditional = jnp.split(output, 2)
        difference = (conditional - unconditional)[..., :channels]
        return jnp.concatenate([unconditional[..., :channels] + scale * difference, conditional[..., channels:]], axis=-1)

    return guided


def segments(times: np.ndarray, interval: tuple[float, float], guided: Any, plain: Any) -> list[tuple[np.ndarray, Any]]:
    """Returns the segments of a decreasing time grid with and without guidance, each as (times, output function).

    Steps that start at low <= t <= high, the interval's ends, have the function `guided`, the others `plain`. A segment of k
    steps has k + 1 times.
    """
    low, high = interval
    inside = [low <= t <= high for t in times[:-1]]
    cuts = [0, *(i for i in range(1, len(inside)) if inside[i] != inside[i - 1]), len(inside)]
    pieces = itertools.pairwise(cuts)
    return [(np.asarray(times[start : stop + 1]), guided if inside[start] else plain) for start, stop in pieces]
