"""MIND, the Monge inception distance: how far features have to be moved, averaged over directions."""

import numpy as np
from jaxtyping import Float

from repae_jax.metrics.distances import check_same_width
from repae_jax.metrics.resampling import GROUPS, SEED, jackknife_error, random_groups

DIRECTIONS = 1000
AT_ONCE = 100  # directions in memory


def random_directions(size: int, count: int = DIRECTIONS, seed: int = SEED) -> Float[np.ndarray, "D F"]:
    """Returns random unit vectors, float32."""
    drawn = np.random.default_rng(seed).standard_normal((count, size), np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def monge_inception_distance(
    reference: Float[np.ndarray, "M F"], samples: Float[np.ndarray, "N F"], directions: Float[np.ndarray, "D F"] | None = None
) -> tuple[float, float]:
    """Computes MIND, 3 F times the mean of the squared 2-Wasserstein distance along random directions, and its standard error.

    Of the larger set, as many images as the smaller one has are drawn, so that the projections can be sorted and paired; fewer
    images give larger distances. The error is the jackknife's, over random groups of both sets, for these directions.

    Reference: Berthet et al., arXiv 2605.06797; torch-fidelity `metric_mind.py` `mind_features_to_metric`.
    """
    reference, samples = (np.asarray(features, np.float32) for features in (reference, samples))
    check_same_width(reference, samples)
    count, size = min(len(reference), len(samples)), reference.shape[1]
    if count < 2 * GROUPS:
        raise ValueError(f"MIND: a set of features has {count} images; needed: {2 * GROUPS} or more, for {GROUPS} groups")
    rng = np.random.default_rng(SEED)
    x, y = (features[rng.permutation(len(features))[:count]] for features in (samples, reference))
    directions = random_directions(size) if directions is None else directions
    groups = random_groups(count)
    sums = np.zeros(GROUPS + 1)  # without each group, and of all
    for first in range(0, len(directions), AT_ONCE):
        some = directions[first : first + AT_ONCE].astype(np.float32)
        sums += _of_groups(x @ some.T, y @ some.T, groups)
    values = 3 * size * sums / len(directions)
    return float(values[-1]), jackknife_error(values[:-1])


def _of_groups(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"], groups: np.ndarray) -> Float[np.ndarray, " _"]:
    """Returns the squared distances, summed over directions, of the images without one group each, and of all of them."""
    orders = np.argsort(x, axis=0), np.argsort(y, axis=0)
    a, b = (np.take_along_axis(part, order, axis=0).astype(np.float64) for part, order in zip((x, y), orders))
    a_groups, b_groups = (groups[order] for order in orders)
    sums = []
    for group in range(GROUPS):  # what is left stays sorted, and every column loses the same number
        left, right = (part.T[(of != group).T].reshape(part.shape[1], -1) for part, of in ((a, a_groups), (b, b_groups)))
        sums.append(((left - right) ** 2).mean(axis=1).sum())
    return np.array([*sums, ((a - b) ** 2).mean(axis=0).sum()])
