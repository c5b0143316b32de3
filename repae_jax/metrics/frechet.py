"""Frechet distance between the Gaussians fitted to two sets of features: FID, sFID and rFID, whatever the features."""

import numpy as np


def gaussian_stats(features):
    """Mean and covariance of a set of features.

    Args:
      features: float [N, F], N >= 2; any dtype, computed in float64.

    Returns:
      mean float64 [F], covariance float64 [F, F] (unbiased: divided by N - 1).

    Raises:
      ValueError: if the features are not a matrix of at least two rows, or not all finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(
            f"features have shape {list(features.shape)}; allowed: [N, F] with N >= 2 and F >= 1, one row per image; "
            "a covariance needs more images"
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f"features of {int((~np.isfinite(features)).any(axis=1).sum())} of {len(features)} images are not finite; "
            "allowed: finite numbers; look for nan in the images, or use float32 in the network"
        )
    # np.cov drops the axes of a single feature
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], features.shape[1])


def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared 2-Wasserstein distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Args:
      mean1: [F].
      cov1: [F, F], symmetric and positive semi-definite; rank-deficient when there were fewer images than features.
      mean2: [F].
      cov2: [F, F], likewise.

    Returns:
      float >= 0, up to rounding; summed over features.

    Raises:
      ValueError: if the sizes do not fit.

    Reference: Heusel et al., arXiv 1706.08500, eq. 6; ADM `evaluations/evaluator.py` `frechet_distance`, which takes a
      general matrix root instead. It is slower, and on singular covariances complex or not finite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
    size = mean1.shape[0] if mean1.ndim == 1 else None
    if size is None or mean2.shape != (size,) or cov1.shape != (size, size) or cov2.shape != (size, size):
        raise ValueError(
            f"means have shapes {list(mean1.shape)} and {list(mean2.shape)}, covariances {list(cov1.shape)} and "
            f"{list(cov2.shape)}; allowed: [F] and [F, F] with one F; take both from the same feature network"
        )
    # S1 S2 and the symmetric S1^(1/2) S2 S1^(1/2) have the same eigenvalues
    root1 = _sqrt(cov1)
    eigenvalues = np.linalg.eigvalsh(root1 @ cov2 @ root1)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root)


def _sqrt(cov):
    """Symmetric root [F, F] of a covariance; eigenvalues that rounding made negative count as zero."""
    eigenvalues, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
