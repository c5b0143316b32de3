"""How far a Frechet distance would move with other samples, and where it would end with infinitely many."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from repae_jax.metrics.frechet import RunningGaussian, Stats, distance_to
from repae_jax.metrics.resampling import GROUPS, SEED, jackknife_error, random_groups

NORMAL_95 = 1.96  # standard errors of a 95 % interval
POINTS = 4  # fewest sizes that a line is fitted through


class Confidence(NamedTuple):
    """Errors of a distance; one standard error each, of the samples alone: the reference counts as exact."""

    stderr: float
    infinity: float | None  # distance of infinitely many samples; None if there are too few
    infinity_stderr: float | None


def least_samples(size: int) -> int:
    """Returns how many samples an extrapolation takes, of so many features: POINTS unions have twice as many or more."""
    return -(-2 * size * GROUPS // (GROUPS - POINTS + 1))


def merged(groups: Sequence[RunningGaussian]) -> RunningGaussian:
    """Returns the features of all groups together."""
    total = RunningGaussian()
    for group in groups:
        total.merge(group)
    return total


def frechet_confidence(groups: Sequence[RunningGaussian], reference: Stats) -> Confidence:
    """Computes errors of the distance between all groups of samples together and a reference.

    The standard error is the jackknife's, without one group each. The distance of N samples is larger than that of infinitely
    many by nearly a constant over N: a line in 1/N is fitted through those of random unions of the groups that have at least
    twice as many samples as there are features, below which the law does not hold. Its error is that of the line and that of
    the samples.

    Reference: Chong and Forsyth, arXiv 1911.07023, sec. 4; dgm-eval `metrics/fd.py` `compute_FD_infinity`, with 15 sizes.
    """
    distance = distance_to(*reference)
    stderr = jackknife_error([distance(*merged([*groups[:i], *groups[i + 1 :]]).stats()) for i in range(len(groups))])
    rng, total = np.random.default_rng(SEED), merged(groups).count
    least = 2 * reference[0].size
    sizes = [k for k in range(1, len(groups) + 1) if k * total >= least * len(groups)]
    if len(sizes) < POINTS:
        return Confidence(stderr, None, None)
    unions = [merged([groups[i] for i in rng.permutation(len(groups))[:k]]) for k in sizes]
    infinity, error = line_at_zero([1 / union.count for union in unions], [distance(*union.stats()) for union in unions])
    return Confidence(stderr, infinity, float(np.hypot(error, stderr)))


def line_at_zero(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns the value at x = 0 of the least-squares line through three points or more, and its standard error."""
    design = np.stack([np.ones(len(x)), np.asarray(x, np.float64)], axis=1)
    heights = np.asarray(y, np.float64)
    coefficients = np.linalg.lstsq(design, heights)[0]
    variance = ((heights - design @ coefficients) ** 2).sum() / (len(heights) - 2)
    return float(coefficients[0]), float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))


def within_noise(a: float, a_stderr: float, b: float, b_stderr: float) -> bool:
    """Returns whether the difference of two independent scores is within its 95 % interval around zero."""
    return abs(a - b) <= NORMAL_95 * float(np.hypot(a_stderr, b_stderr))


def split(features: np.ndarray) -> list[RunningGaussian]:
    """Returns features [N, F] as GROUPS groups, at random: whatever order the classes come in does no harm."""
    members, groups = random_groups(len(features)), []
    for number in range(GROUPS):
        group = RunningGaussian()
        group.update(features[members == number])
        groups.append(group)
    return groups
