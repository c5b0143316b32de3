"""Maximum mean discrepancy of two sets of features: KID with a polynomial kernel, CMMD with a Gaussian one."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from repae_jax.metrics.distances import BLOCK_SIZE, check_same_width
from repae_jax.metrics.resampling import GROUPS, SEED, jackknife_error, random_groups

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
BANDWIDTH = 10.0  # of CMMD's kernel, for features of length 1
SCALE = 1000.0  # that CMMD is multiplied with


def kernel_inception_distance(
    reference: Float[np.ndarray, "M F"], samples: Float[np.ndarray, "N F"],
    subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE,
) -> tuple[float, float]:
    """Computes KID: the unbiased estimate of MMD^2 with the kernel (x.y / F + 1)^3, its mean and deviation over subsets.

    Random subsets without replacement, the same as torch-fidelity's; in float64. The deviation is over subsets, as published:
    it says how much KIDs of `subset_size` images scatter, and nothing of how many images there are. Papers often show a
    thousand times KID.

    Reference: Binkowski et al., arXiv 1801.01401, sec. 4; torch-fidelity `metric_kid.py` `kid_features_to_metric`.
    """
    reference, samples = np.asarray(reference), np.asarray(samples)
    check_same_width(reference, samples)
    if (fewest := min(len(reference), len(samples))) < subset_size:
        raise ValueError(f"KID: a set of features has {fewest} images; needed: {subset_size}, the size of a subset, or more")
    rng = np.random.RandomState(SEED)
    values = []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), subset_size, replace=False)].astype(np.float64)
        values.append(_mean_of_others(x) + _mean_of_others(y) - 2 * _polynomial(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def _polynomial(x: Float[np.ndarray, "m F"], y: Float[np.ndarray, "m F"]) -> Float[np.ndarray, "m m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_others(x: Float[np.ndarray, "m F"]) -> float:
    """Returns the mean of the kernel over pairs of different features."""
    kernel = _polynomial(x, x)
    return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))


def cmmd(
    reference: Float[np.ndarray, "M F"], samples: Float[np.ndarray, "N F"], block_size: int = BLOCK_SIZE
) -> tuple[float, float]:
    """Computes CMMD, 1000 MMD^2 with the kernel exp(-|x - y|^2 / 200), and its standard error.

    Features have length 1. The estimate is the one with the diagonals, which is never negative and as published; the error is
    the jackknife's, over random groups of both sets.

    Reference: Jayasumana et al., arXiv 2401.09603, sec. 5; google-research `cmmd/distance.py` `mmd`.
    """
    reference, samples = np.asarray(reference), np.asarray(samples)
    check_same_width(reference, samples)
    if (fewest := min(len(reference), len(samples))) < 2 * GROUPS:
        raise ValueError(f"CMMD: a set of features has {fewest} images; needed: {2 * GROUPS} or more, for {GROUPS} groups")
    x, y = (_grouped_blocks(features, block_size) for features in (samples, reference))
    sums = _kernel_sums(x, x), _kernel_sums(y, y), _kernel_sums(x, y)
    counts = [np.bincount(random_groups(len(features)), minlength=GROUPS) for features in (samples, reference)]
    without = [_mmd(sums, counts, np.arange(GROUPS) != group) for group in range(GROUPS)]
    return SCALE * _mmd(sums, counts, np.ones(GROUPS, bool)), SCALE * jackknife_error(without)


def _grouped_blocks(features: Float[np.ndarray, "N F"], block_size: int) -> list[tuple[int, Array, Array]]:
    """Returns (group, features, weights) of blocks of one size, of one group each; the weight of padding is 0, others' 1."""
    groups = random_groups(len(features))
    members = [np.flatnonzero(groups == group) for group in range(GROUPS)]
    size = min(block_size, max(map(len, members)))
    blocks = []
    for group, rows in enumerate(members):
        for first in range(0, len(rows), size):
            block = features[rows[first : first + size]].astype(np.float32)
            if not np.isfinite(block).all():
                raise ValueError("some features are not finite; look for nan in the images, or use float32 in the network")
            missing = size - len(block)
            weights = np.pad(np.ones(len(block), np.float32), (0, missing))
            blocks.append((group, jax.device_put(np.pad(block, ((0, missing), (0, 0)))), jax.device_put(weights)))
    return blocks


def _kernel_sums(x_blocks: list, y_blocks: list) -> Float[np.ndarray, "G G"]:
    """Returns the sums of the kernel, less 1, over all pairs of a group of x and a group of y."""
    sums, is_symmetric = np.zeros((GROUPS, GROUPS)), x_blocks is y_blocks
    for i, (x_group, x, x_weights) in enumerate(x_blocks):
        for j, (y_group, y, y_weights) in enumerate(y_blocks):
            if is_symmetric and j < i:
                continue
            of_pair = np.asarray(_row_sums(x, y, y_weights), np.float64) @ np.asarray(x_weights, np.float64)
            sums[x_group, y_group] += of_pair
            if is_symmetric and j > i:
                sums[y_group, x_group] += of_pair
    return sums


@jax.jit
def _row_sums(x: Float[Array, "n F"], y: Float[Array, "m F"], weights: Float[Array, " m"]) -> Float[Array, " n"]:
    """Computes sum_j w_j (exp(-|x_i - y_j|^2 / (2 BANDWIDTH^2)) - 1).

    All kernels are close to 1, of which float32 has no digits to lose; in the discrepancy the ones cancel.
    """
    product = jnp.dot(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None] - 2 * product
    return (jnp.expm1(-squares.clip(min=0) / (2 * BANDWIDTH**2)) * weights).sum(axis=1)


def _mmd(sums: tuple, counts: list, chosen: np.ndarray) -> float:
    """Returns MMD^2 of the chosen groups."""
    xx, yy, xy = (part[np.ix_(chosen, chosen)].sum() for part in sums)
    n, m = (float(count[chosen].sum()) for count in counts)
    return float(xx / n**2 + yy / m**2 - 2 * xy / (n * m))
