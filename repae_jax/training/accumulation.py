"""Gradient accumulation: a batch in equal micro-batches, one after the other.

What a loss gives besides its gradient comes in three kinds, which are put together differently: means, rows and a carry.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Aux(NamedTuple):
    """Auxiliary output of a loss."""

    terms: dict[str, jax.Array]  # scalars, averaged over micro-batches
    rows: Any = None  # tree of arrays with a leading batch axis, returned in the batch's order
    carry: Any = None  # tree for the next micro-batch, such as running statistics; of the structure of the one received


def accumulated_grad(loss, params, x, carry=None, *, micro_batches: int):
    """Computes the gradient of a loss, (params, x, carry) -> (scalar, Aux), with respect to `params`, see `accumulate`.

    Returns:
      grads, terms with the loss itself as 'loss' (both means over micro-batches), rows, carry after the last micro-batch.
    """

    def micro_batch(carry, x):
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, x, carry)
        return aux.carry, (grads, {"loss": value, **aux.terms}), aux.rows

    carry, (grads, terms), rows = accumulate(micro_batch, carry, x, micro_batches)
    return grads, terms, rows, carry


def accumulate(fn, carry, batch, micro_batches: int):
    """Runs `fn` over equal micro-batches; returns the last carry, the mean tree, and the rows [B, ...] in their order.

    Args:
      fn: (carry, micro-batch) -> (carry, tree to average over micro-batches, tree with a leading batch axis or None).
      batch: tree of [B, ...]; B divisible by `micro_batches`. Micro-batch j takes rows j, j + micro_batches, …, so that a batch
        sharded over its first axis stays where it is.
    """
    if micro_batches == 1:
        return fn(carry, batch)

    def split(x):
        return x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def body(state, micro_batch):
        carry, total = state
        carry, means, rows = fn(carry, micro_batch)
        return (carry, jax.tree.map(jnp.add, total, means)), rows

    batch = jax.tree.map(split, batch)
    shapes = jax.eval_shape(fn, carry, jax.tree.map(lambda x: x[0], batch))[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (carry, total), rows = jax.lax.scan(body, (carry, zeros), batch)
    return carry, jax.tree.map(lambda x: x / micro_batches, total), jax.tree.map(join, rows)
