"""Precision and recall of generated images: overlap of two sets of features, whose shapes nearest neighbours trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBORS = 3
BLOCK_SIZE = 5000  # a block of distances takes 100 MB


def precision_recall(reference, samples, neighbors=NEIGHBORS, block_size=BLOCK_SIZE):
    """Share of samples near the reference, and of the reference near samples.

    A feature is near a set if it lies in the ball around any of the set's features, whose radius is the distance to that
    feature's `neighbors`-th nearest neighbour in the set, itself left out. Distances are computed block by block in float32;
    the published code computes them in float16, and in float32 where those overflow.

    Args:
      reference: [M, F], finite, M > neighbors.
      samples: [N, F], finite, N > neighbors.
      neighbors: see above.
      block_size: features whose distances are in memory at a time.

    Returns:
      (precision, recall), floats in [0, 1]: fractions of the samples and of the reference.

    Raises:
      ValueError: if the shapes do not fit, or something is not finite.

    Reference: Kynkäänniemi et al., arXiv 1904.06991, eq. 1-2; ADM `evaluations/evaluator.py` `ManifoldEstimator`.
    """
    reference, samples = np.asarray(reference), np.asarray(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features have shapes {list(reference.shape)} and {list(samples.shape)}; allowed: [M, F] and [N, F] with one F; "
            "take both from the same feature network"
        )
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbors:
            raise ValueError(f"{name}: {len(features)} features; needed: more than the {neighbors} neighbours of each")
    center = reference.mean(axis=0, dtype=np.float64)
    reference, samples = (_Blocks(features, center, block_size) for features in (reference, samples))
    reference_radii, sample_radii = _radii(reference, neighbors), _radii(samples, neighbors)
    is_sample_near = [np.zeros(len(norms), bool) for _, norms in samples]
    is_reference_near = [np.zeros(len(norms), bool) for _, norms in reference]
    for i, a in enumerate(reference):
        for j, b in enumerate(samples):
            a_near, b_near = _near(a, b, reference_radii[i], sample_radii[j])
            is_reference_near[i] |= np.asarray(a_near)
            is_sample_near[j] |= np.asarray(b_near)
    return samples.mean(is_sample_near), reference.mean(is_reference_near)


class _Blocks:
    """Features cut into blocks of one size: (float32 [b, F], squared norms [b]); the last is filled up, with infinite norms.

    Subtracting one centre from all features leaves their distances, and keeps float32 from losing them in large norms.
    """

    def __init__(self, features, center, block_size):
        self._count = len(features)
        size = min(block_size, self._count)
        self._blocks = []
        for first in range(0, self._count, size):
            block = (features[first : first + size] - center).astype(np.float32)
            if not np.isfinite(block).all():
                raise ValueError("some features are not finite; look for nan in the images, or use float32 in the network")
            missing = size - len(block)
            norms = np.einsum("nf,nf->n", block, block, dtype=np.float64).astype(np.float32)
            block, norms = np.pad(block, ((0, missing), (0, 0))), np.pad(norms, (0, missing), constant_values=np.inf)
            self._blocks.append((jax.device_put(block), jax.device_put(norms)))

    def __len__(self):
        return len(self._blocks)

    def __getitem__(self, i):
        return self._blocks[i]

    def mean(self, per_block):
        """Mean of values [b] per block over the features that are there."""
        return float(np.concatenate(per_block)[: self._count].mean())


def _distances(a, b):
    """Squared distances [n, m] of two blocks."""
    (a, a_norms), (b, b_norms) = a, b
    product = jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(a_norms[:, None] + b_norms[None] - 2 * product, 0)


@functools.partial(jax.jit, static_argnames="neighbors")
def _nearest(a, b, neighbors):
    """Distances [n, k] and [m, k] to the nearest ones in the other block, nearest first."""
    distances = _distances(a, b)
    return _smallest(distances, neighbors), _smallest(distances.T, neighbors)


@functools.partial(jax.jit, static_argnames="neighbors")
def _nearest_others(a, neighbors):
    """Distances [n, k] to the nearest ones in the same block, without the feature itself."""
    distances = _distances(a, a)
    return _smallest(jnp.where(jnp.eye(len(distances), dtype=bool), jnp.inf, distances), neighbors)


def _smallest(distances, neighbors):
    missing = max(0, neighbors - distances.shape[1])
    return -jax.lax.top_k(-jnp.pad(distances, ((0, 0), (0, missing)), constant_values=jnp.inf), neighbors)[0]


@jax.jit
def _merge(one, other):
    """The k smallest of two sets [n, k]."""
    return _smallest(jnp.concatenate([one, other], axis=1), one.shape[1])


@jax.jit
def _near(a, b, a_radii, b_radii):
    """Which of a [n] lie in a ball of b, which of b [m] in one of a."""
    distances = _distances(a, b)
    return (distances <= b_radii[None]).any(axis=1), (distances <= a_radii[:, None]).any(axis=0)


def _radii(blocks, neighbors):
    """Squared distances to the k-th nearest neighbours, [b] per block; -1 for what fills up the last block."""
    nearest = [_nearest_others(block, neighbors) for block in blocks]
    for i in range(len(blocks)):
        for j in range(i):  # distances are symmetric: each block of them serves rows and columns
            of_i, of_j = _nearest(blocks[i], blocks[j], neighbors)
            nearest[i], nearest[j] = _merge(nearest[i], of_i), _merge(nearest[j], of_j)
    return [jnp.where(jnp.isfinite(norms), found[:, -1], -1) for found, (_, norms) in zip(nearest, blocks)]
