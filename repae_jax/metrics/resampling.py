"""Errors of scores from groups of images: the delete-a-group jackknife."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

GROUPS = 10  # the error is itself uncertain by a quarter: 1 / sqrt(2 (GROUPS - 1))
SEED = 2020  # torch-fidelity's


def jackknife_error(without: Sequence[float]) -> float:
    """Returns the standard error of a score from its values without one group each: sqrt((G - 1) / G sum (x - mean)^2).

    The groups are of equal size, and drawn at random or alike in another way.

    Reference: Quenouille, 1956; Efron and Tibshirani, An introduction to the bootstrap, eq. 11.5, for groups of one.
    """
    values = np.asarray(without, np.float64)
    return float(np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()))


def random_groups(count: int, seed: int = SEED) -> Int[np.ndarray, " N"]:
    """Returns the group 0..GROUPS - 1 of each of `count` images, at random; sizes differ by one at most."""
    return np.random.default_rng(seed).permutation(np.arange(count) % GROUPS)
