"""Two times in one image: some tokens have the one, the others the other.

Reference: dual-timestep scheduling of Self-Flow (arXiv 2603.06507), section 3.3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Times = Float[Array, " B"]


def mix(
    key: Array, first: Times, second: Times, share: float, grid: tuple[int, int], patch_size: int
) -> Float[Array, "B h w"]:  # fmt: skip
    """Returns a time for each position of latents of a grid (h, w), the same in a token, as in equation 4 of Self-Flow.

    Each token has the second time with probability `share`, the first one otherwise.
    """
    rows, columns = (side // patch_size for side in grid)
    is_second = jax.random.uniform(key, (first.shape[0], rows, columns)) < share
    times = jnp.where(is_second, second[:, None, None], first[:, None, None])
    return jnp.repeat(jnp.repeat(times, patch_size, axis=1), patch_size, axis=2)


def least(t: Float[Array, "B ..."]) -> Times:
    """Returns the time of the cleanest token of each sample; a time of the whole sample is its own."""
    return jnp.min(t, axis=tuple(range(1, t.ndim)))
