"""Frechet distance between Gaussians fitted to two sets of features: FID, sFID and rFID, whatever the features are."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Mean = Float[np.ndarray, " F"]
Cov = Float[np.ndarray, "F F"]
Stats = tuple[Mean, Cov]


class RunningGaussian:
    """Mean and covariance of features that come in batches, in float64; they need not fit in memory together.

    Nothing cancels when the mean is large against the spread: deviations from each batch's own mean are summed, and merged
    by Chan's formula: Chan, Golub and LeVeque, 1983, Algorithms for computing the sample variance, eq. 1.3.
    """

    def __init__(self, count: int = 0, mean: Mean | None = None, scatter: Cov | None = None):
        self.count, self.mean = count, mean
        self.scatter = scatter  # sum of the outer products of the deviations from the mean

    def update(self, features: Float[np.ndarray, "N F"]) -> None:
        """Adds a batch of any dtype, which may be empty; ValueError unless it is a finite matrix as wide as those before."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] < 1:
            raise ValueError(f"features have shape {list(features.shape)}; allowed: [N, F] with F >= 1, one row per image")
        if not np.isfinite(features).all():
            raise ValueError(
                f"features of {int((~np.isfinite(features)).any(axis=1).sum())} of {len(features)} images are not finite; "
                "allowed: finite numbers; look for nan in the images, or use float32 in the network"
            )
        if len(features):
            mean = features.mean(axis=0)
            deviations = features - mean
            self.merge(RunningGaussian(len(features), mean, deviations.T @ deviations))

    def merge(self, other: "RunningGaussian") -> None:
        """Adds the features of another RunningGaussian; raises ValueError if they have another size."""
        if other.mean is None or other.scatter is None:
            return
        if self.mean is None or self.scatter is None:
            self.count, self.mean, self.scatter = other.count, other.mean.copy(), other.scatter.copy()
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"features have {other.mean.size} numbers, those before {self.mean.size}; take all from one feature network"
            )
        count = self.count + other.count
        difference = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += np.outer(difference, difference * (self.count * other.count / count))
        self.mean = self.mean + difference * (other.count / count)
        self.count = count

    def stats(self) -> Stats:
        """Returns the mean and the unbiased covariance (divided by N - 1); raises ValueError for fewer than two features."""
        if self.count < 2 or self.mean is None or self.scatter is None:
            raise ValueError(f"there are features of {self.count} images; a covariance needs 2 or more")
        return self.mean, self.scatter / (self.count - 1)


def gaussian_stats(features: Float[np.ndarray, "N F"]) -> Stats:
    """Returns the mean and the unbiased covariance of a set of features, in float64; errors as of RunningGaussian."""
    running = RunningGaussian()
    running.update(features)
    return running.stats()


def frechet_distance(mean1: Mean, cov1: Cov, mean2: Mean, cov2: Cov) -> float:
    """Computes the squared 2-Wasserstein distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The covariances are symmetric and positive semi-definite: rank-deficient where there were fewer images than features. The
    distance is summed over the features, and >= 0 up to rounding.

    Reference: Heusel et al., arXiv 1706.08500, eq. 6; ADM `evaluations/evaluator.py` `frechet_distance`, which takes a
      general matrix root instead. It is slower, and on singular covariances complex or not finite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
    if mean1.ndim != 1 or mean1.shape != mean2.shape or not cov1.shape == cov2.shape == (mean1.size, mean1.size):
        raise ValueError(
            f"means have shapes {list(mean1.shape)} and {list(mean2.shape)}, covariances {list(cov1.shape)} and "
            f"{list(cov2.shape)}; allowed: [F] and [F, F] with one F; take both from the same feature network"
        )
    return distance_to(mean1, cov1)(mean2, cov2)


def distance_to(mean: Mean, cov: Cov) -> Callable[[Mean, Cov], float]:
    """Returns the distance to one Gaussian as a function of another one, with the costly root of its covariance taken once."""
    # S1 S2 and the symmetric S1^(1/2) S2 S1^(1/2) have the same eigenvalues; those that rounding made negative count as zero.
    eigenvalues, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T

    def distance(other_mean, other_cov):
        trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ other_cov @ root).clip(min=0)).sum()
        return float(((mean - other_mean) ** 2).sum() + np.trace(cov) + np.trace(other_cov) - 2 * trace_of_root)

    return distance
