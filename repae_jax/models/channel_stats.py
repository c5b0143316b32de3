"""Per-channel batch statistics and their running averages, as plain functions on arrays."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class ChannelStats:
    """Mean and variance of each channel.

    Attributes:
      mean: float32 [C].
      var: float32 [C].
    """

    mean: jax.Array
    var: jax.Array


def batch_stats(x):
    """Statistics of a batch over every axis but the last; global over a sharded batch under jit.

    Args:
      x: [..., C], any float dtype; reduced in float32.

    Returns:
      ChannelStats with the biased (1/n) variance, the one torch's batch norm normalises with.
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return ChannelStats(mean=mean, var=jnp.square(x - mean).mean(axes))


def update_running(running, batch, count, momentum):
    """running + momentum * (batch - running), with the variance made unbiased first, as torch does.

    Args:
      running: ChannelStats so far.
      batch: ChannelStats of `batch_stats` (biased variance).
      count: number of values each statistic was reduced over (n); at least 2.
      momentum: weight of the new batch (torch's convention: 0.1).

    Returns:
      ChannelStats.

    Raises:
      ValueError: for count < 2, whose unbiased variance is undefined.
    """
    if count < 2:
        raise ValueError(f"running variance needs at least 2 values per channel, got {count}; raise the batch size")
    unbiased = ChannelStats(mean=batch.mean, var=batch.var * (count / (count - 1)))
    return jax.tree.map(lambda r, b: (1 - momentum) * r + momentum * b, running, unbiased)
