"""Samples beside the training images that they are closest to, in the space of some features."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from repae_jax.metrics.distances import BLOCK_SIZE, Block, centered_blocks, check_same_width, squared_distances

QUANTILE = 0.01  # of distances between real images: nearer pairs count as memorized


class Nearest(NamedTuple):
    """The nearest training image of each sample."""

    distance: Float[np.ndarray, " N"]
    neighbor: Int[np.ndarray, " N"]


def nearest(
    samples: Float[np.ndarray, "N F"], training: Iterable[Float[np.ndarray, "m F"]],
    itself: Int[np.ndarray, " N"] | None = None, block_size: int = BLOCK_SIZE,
) -> Nearest:
    """Returns the training image nearest to each sample, by Euclidean distance; the first of several.

    It is looked for in float32, so of some that are equally near up to rounding any may be found; the distance to it is exact,
    and zero for a copy. The training images come in parts. `itself` are the samples' own numbers among them, if they are
    training images, too: they are left out. ValueError if there are no other training images, or the features are of another
    width.
    """
    samples = np.asarray(samples)
    best, index, first, blocks = np.full(len(samples), np.inf), np.full(len(samples), -1), 0, None
    closest = np.zeros_like(samples)  # the features found
    for part in training:
        part = np.asarray(part)
        check_same_width(part, samples)
        if blocks is None:
            center = part.mean(axis=0, dtype=np.float64)
            blocks = centered_blocks(samples, center, block_size)
        start = first
        for others in centered_blocks(part, center, block_size):
            own = np.full(len(samples), -1) if itself is None else itself - first
            found = [_nearest(block, others, _padded(own, i, block)) for i, block in enumerate(blocks)]
            distance, at = (np.concatenate([np.asarray(pair[k]) for pair in found])[: len(samples)] for k in (0, 1))
            nearer = distance < best
            best, index = np.where(nearer, distance, best), np.where(nearer, first + at, index)
            closest[nearer] = part[first - start + at[nearer]]
            first += int(np.isfinite(np.asarray(others[1])).sum())  # without the padding
    if len(samples) and (index < 0).any():
        raise ValueError("there is no training image to compare with; needed: one or more besides the sample itself")
    return Nearest(_lengths(samples, closest, block_size), index)


def _lengths(a: Float[np.ndarray, "N F"], b: Float[np.ndarray, "N F"], block_size: int) -> Float[np.ndarray, " N"]:
    """Returns the distances of features from their counterparts, in float64: nothing cancels, as it does in products."""
    blocks = (slice(first, first + block_size) for first in range(0, len(a), block_size))
    return np.concatenate([np.zeros(0), *(np.linalg.norm(a[rows].astype(np.float64) - b[rows], axis=1) for rows in blocks)])


def _padded(own: Int[np.ndarray, " N"], i: int, block: Block) -> Int[np.ndarray, " b"]:
    size = len(block[1])
    part = own[i * size : (i + 1) * size]
    return np.pad(part, (0, size - len(part)), constant_values=-1)


@jax.jit
def _nearest(a: Block, b: Block, own: Int[Array, " n"]) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """Returns the smallest squared distance of each feature of a to one of b, other than b's number `own`, and its number."""
    distances = squared_distances(a, b)
    distances = jnp.where(own[:, None] == jnp.arange(distances.shape[1])[None], jnp.inf, distances)
    return distances.min(axis=1), distances.argmin(axis=1)
