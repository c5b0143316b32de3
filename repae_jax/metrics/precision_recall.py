"""Precision and recall of generated images: the overlap of two sets of features, whose shapes nearest neighbors trace."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from repae_jax.metrics.distances import BLOCK_SIZE, Block, centered_blocks, check_same_width, squared_distances

NEIGHBORS = 3


def precision_recall(
    reference: Float[np.ndarray, "M F"], samples: Float[np.ndarray, "N F"],
    neighbors: int = NEIGHBORS, block_size: int = BLOCK_SIZE,
) -> tuple[float, float]:
    """Computes the share of samples near the reference (precision), and of the reference near samples (recall).

    A feature is near a set if it lies in the ball around any of the set's features, whose radius is the distance to that
    feature's `neighbors`-th nearest neighbor in the set, itself left out. Distances are computed block by block in float32;
    the published code computes them in float16, and in float32 where those overflow. M and N must be above `neighbors`.

    Reference: Kynkäänniemi et al., arXiv 1904.06991, eq. 1-2; ADM `evaluations/evaluator.py` `ManifoldEstimator`.
    """
    reference, samples = np.asarray(reference), np.asarray(samples)
    check_same_width(reference, samples)
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbors:
            raise ValueError(f"{name}: {len(features)} features; needed: more than the {neighbors} neighbors of each")
    # Subtracting one center from all features leaves their distances, and keeps float32 from losing them in large norms.
    center = reference.mean(axis=0, dtype=np.float64)
    reference_blocks, sample_blocks = (centered_blocks(features, center, block_size) for features in (reference, samples))
    reference_radii, sample_radii = _radii(reference_blocks, neighbors), _radii(sample_blocks, neighbors)
    sample_is_near = [np.zeros(len(norms), bool) for _, norms in sample_blocks]
    reference_is_near = [np.zeros(len(norms), bool) for _, norms in reference_blocks]
    for i, a in enumerate(reference_blocks):
        for j, b in enumerate(sample_blocks):
            a_near, b_near = _near(a, b, reference_radii[i], sample_radii[j])
            reference_is_near[i] |= np.asarray(a_near)
            sample_is_near[j] |= np.asarray(b_near)
    precision = np.concatenate(sample_is_near)[: len(samples)].mean()
    return float(precision), float(np.concatenate(reference_is_near)[: len(reference)].mean())


@functools.partial(jax.jit, static_argnames="neighbors")
def _nearest_others(a: Block, neighbors: int) -> Float[Array, "n k"]:
    """Returns the distances to the nearest features of the same block, without the feature itself."""
    distances = squared_distances(a, a)
    return _smallest(jnp.where(jnp.eye(len(distances), dtype=bool), jnp.inf, distances), neighbors)


def _smallest(distances: Float[Array, "n m"], neighbors: int) -> Float[Array, "n k"]:
    missing = max(0, neighbors - distances.shape[1])
    return -jax.lax.top_k(-jnp.pad(distances, ((0, 0), (0, missing)), constant_values=jnp.inf), neighbors)[0]


@jax.jit
def _nearest(a: Block, b: Block, of_a: Float[Array, "n k"], of_b: Float[Array, "m k"]) -> list[Float[Array, "_ k"]]:
    """Returns the smallest distances of each block so far, of_a and of_b, or to features of the other block, nearest first."""
    distances = squared_distances(a, b)
    candidates = ((of_a, distances), (of_b, distances.T))
    return [_smallest(jnp.concatenate([old, new], axis=1), old.shape[1]) for old, new in candidates]


@jax.jit
def _near(
    a: Block, b: Block, a_radii: Float[Array, " n"], b_radii: Float[Array, " m"]
) -> tuple[Bool[Array, " n"], Bool[Array, " m"]]:
    """Tells which features of a lie in a ball of b, and which of b in a ball of a."""
    distances = squared_distances(a, b)
    return (distances <= b_radii[None]).any(axis=1), (distances <= a_radii[:, None]).any(axis=0)


def _radii(blocks: list[Block], neighbors: int) -> list[Float[Array, " b"]]:
    """Returns the squared distances to the k-th nearest neighbors per block; -1 for the padding of the last block."""
    nearest = [_nearest_others(block, neighbors) for block in blocks]
    for i, j in itertools.combinations(range(len(blocks)), 2):  # each block of distances serves rows and columns
        nearest[i], nearest[j] = _nearest(blocks[i], blocks[j], nearest[i], nearest[j])
    return [jnp.where(jnp.isfinite(norms), distances[:, -1], -1) for distances, (_, norms) in zip(nearest, blocks)]
