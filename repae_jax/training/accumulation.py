"""Gradient accumulation: a batch in equal parts, one after the other."""

import jax
import jax.numpy as jnp


def accumulate(fn, carry, batch, parts):
    """Run `fn` over equal micro-batches one after the other.

    Args:
      fn: (carry, micro-batch) -> (carry, tree to average over micro-batches, tree with a leading batch axis or None).
      carry: passed from one micro-batch to the next.
      batch: tree of [B, ...]; B divisible by `parts`. Micro-batch j takes rows j, j + parts, …, so that a batch sharded over
        its first axis stays where it is.
      parts: number of micro-batches.

    Returns:
      carry, mean tree, batch tree [B, ...] in the original order.
    """
    if parts == 1:
        return fn(carry, batch)

    def split(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def body(state, part):
        carry, total = state
        carry, means, rows = fn(carry, part)
        return (carry, jax.tree.map(jnp.add, total, means)), rows

    batch = jax.tree.map(split, batch)
    shapes = jax.eval_shape(fn, carry, jax.tree.map(lambda x: x[0], batch))[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (carry, total), rows = jax.lax.scan(body, (carry, zeros), batch)
    return carry, jax.tree.map(lambda x: x / parts, total), jax.tree.map(join, rows)
