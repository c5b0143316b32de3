"""Per-channel batch statistics and their running averages, as plain functions on arrays."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class ChannelStats:
    """Mean and variance of each channel, float32."""

    mean: Float[Array, " C"]
    var: Float[Array, " C"]


def batch_stats(x: Float[Array, "*B C"]) -> ChannelStats:
    """Returns statistics over every axis but the last, reduced in float32; global over a sharded batch under jit.

    The variance is the biased (1/n) one, with which torch's batch norm normalizes.
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return ChannelStats(mean=mean, var=jnp.square(x - mean).mean(axes))


def update_running(running: ChannelStats, batch: ChannelStats, count: int, momentum: float) -> ChannelStats:
    """Returns running + momentum * (batch - running), with the batch's variance made unbiased first, as torch does.

    Each statistic of the batch was reduced over `count` values; ValueError for less than 2, which have no unbiased variance.
    """
    if count < 2:
        raise ValueError(f"running variance needs at least 2 values per channel, got {count}; raise the batch size")
    unbiased = ChannelStats(mean=batch.mean, var=batch.var * (count / (count - 1)))
    return jax.tree.map(lambda r, b: (1 - momentum) * r + momentum * b, running, unbiased)
