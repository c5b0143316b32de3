"""Similarity of representations (CKNNA, mutual nearest neighbors, CKA) and their principal components.

All similarities are inner products of features [N, F], one row per image; `unit_rows` makes them cosines, as published
measurements do. No N x N matrix is ever whole: only the nearest neighbors of a kernel are kept.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

FORMULAS = ("paper", "platonic_code")
EPSILON = 1e-6  # added to denominators, as in the released code


def unit_rows(features: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "N F"]:
    """Returns float32 features with rows of length 1; rows of zeros stay."""
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The nearest images of each image by one representation."""

    indices: Int[np.ndarray, "N k"]  # the most similar images, not the image itself, in no order
    similarities: Float[np.ndarray, "N k"]  # inner products with them, in float64
    row_means: Float[np.ndarray, " N"]  # mean inner product with all N images, itself included, in float64


def nearest(features: Float[np.ndarray, "N F"], k: int = 10, rows: int = 1024) -> Neighbors:
    """Finds the k nearest neighbors by inner product, in float32, with `rows` rows of the kernel in memory at a time."""
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or k < 1 or len(features) < k + 2:
        raise ValueError(
            f"features have shape {list(features.shape)}, k is {k}; allowed: [N, F] with N >= k + 2 and k >= 1: with fewer "
            "images all are neighbors of all"
        )
    if not np.isfinite(features).all():
        bad = f"{(~np.isfinite(features)).any(axis=1).sum()} of {len(features)}"
        raise ValueError(f"features of {bad} images are not finite; look for nan in the images or the weights")
    indices, similarities = [], []
    for first in range(0, len(features), rows):
        kernel = features[first : first + rows] @ features.T
        itself = np.arange(len(kernel))
        kernel[itself, first + itself] = -np.inf
        indices.append(np.argpartition(kernel, -k, axis=1)[:, -k:])
        similarities.append(np.take_along_axis(kernel, indices[-1], axis=1).astype(np.float64))
    row_means = features.astype(np.float64) @ features.mean(axis=0, dtype=np.float64)
    return Neighbors(np.concatenate(indices), np.concatenate(similarities), row_means)


def _mutual(a: Neighbors, b: Neighbors) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the pairs (i, j) with j among i's neighbors by both: rows, columns, similarities by a and by b, row-major."""
    if a.indices.shape != b.indices.shape:
        shapes = f"{list(a.indices.shape)} and {list(b.indices.shape)}"
        raise ValueError(f"neighbors are {shapes}; allowed: the same images and k for both")
    size = len(a.indices)
    of_a, of_b = ((np.arange(size)[:, None] * size + x.indices).ravel() for x in (a, b))
    common, in_a, in_b = np.intersect1d(of_a, of_b, assume_unique=True, return_indices=True)
    rows, columns = np.divmod(common, size)
    return rows, columns, a.similarities.ravel()[in_a], b.similarities.ravel()[in_b]


def _centered_alignment(a: Neighbors, b: Neighbors) -> float:
    rows, _, by_a, by_b = _mutual(a, b)
    return ((by_a - a.row_means[rows]) * (by_b - b.row_means[rows])).sum()


def _unbiased_alignment(a: Neighbors, b: Neighbors) -> float:
    """Computes Song et al.'s unbiased HSIC of the two kernels, each 0 but at mutual neighbors (and so not symmetric)."""
    rows, columns, by_a, by_b = _mutual(a, b)
    size = len(a.indices)
    codes, mirrored = rows * size + columns, columns * size + rows
    at = np.searchsorted(codes, mirrored).clip(max=max(len(codes) - 1, 0))
    is_pair = codes[at] == mirrored
    trace = (by_a[is_pair] * by_b[at[is_pair]]).sum()
    product = (np.bincount(columns, by_a, size) * np.bincount(rows, by_b, size)).sum()
    sums = by_a.sum() * by_b.sum() / ((size - 1) * (size - 2))
    return (trace + sums - 2 * product / (size - 2)) / (size * (size - 3))


def neighbor_alignment(a: Neighbors, b: Neighbors, formula: str = "paper") -> float:
    """Computes CKNNA of two representations from their neighbors, for the same images and k.

    By the formula 'paper', kernels are centered by the mean of each row over all images, then summed over mutual neighbors. By
    'platonic_code', the released code's, they are set to 0 but at mutual neighbors, then unbiased HSIC. They differ, and the
    second is not quite symmetric in a and b.

    It is 1 for equal representations (with 'platonic_code' a little below, for the 1e-6 in its denominator), and nan if one is
    the same for all images.

    Reference: Huh et al., arXiv 2405.07987, appendix A; REPA, arXiv 2410.06940, equations 22 to 24; platonic-rep `metrics.py`
      `AlignmentMetrics.cknna`.
    """
    if formula not in FORMULAS:
        raise ValueError(f"formula {formula!r} is unknown; allowed: {', '.join(FORMULAS)}")
    align, epsilon = (_centered_alignment, 0) if formula == "paper" else (_unbiased_alignment, EPSILON)
    alignment, product = align(a, b), align(a, a) * align(b, b)
    return float(alignment / (np.sqrt(product) + epsilon)) if product > 0 else np.nan


def neighbor_overlap(a: Neighbors, b: Neighbors) -> float:
    """Computes the mean share of an image's k neighbors that both representations have, in [0, 1]."""
    return len(_mutual(a, b)[0]) / a.indices.size


def cknna(a: Float[np.ndarray, "N F"], b: Float[np.ndarray, "N G"], k: int = 10, formula: str = "paper") -> float:
    """Computes the centered kernel nearest-neighbor alignment of features of the same images; see `neighbor_alignment`."""
    return neighbor_alignment(nearest(a, k), nearest(b, k), formula)


def mutual_knn(a: Float[np.ndarray, "N F"], b: Float[np.ndarray, "N G"], k: int = 10) -> float:
    """Computes the mean share of an image's k nearest neighbors that both representations have, in [0, 1]."""
    return neighbor_overlap(nearest(a, k), nearest(b, k))


def cka(a: Float[np.ndarray, "N F"], b: Float[np.ndarray, "N G"], unbiased: bool = False) -> float:
    """Computes the linear centered kernel alignment in float64, through feature covariances: no kernel is made.

    With `unbiased` it uses Song et al.'s unbiased HSIC, for few images of many features, and may be below 0. It is 1 for equal
    representations, but for the released code's 1e-6 in its denominator, and nan if one is the same for all images.

    Reference: Kornblith et al., arXiv 1905.00414; unbiased: Nguyen et al., arXiv 2010.15327, equation 3; platonic-rep
      `metrics.py` `AlignmentMetrics.cka`.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 4:
        raise ValueError(f"features have shapes {list(a.shape)} and {list(b.shape)}; allowed: [N, F] and [N, G] with N >= 4")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)  # changes neither kind, but spares rounding
    hsic = _unbiased_hsic if unbiased else lambda x, y: np.square(x.T @ y).sum()
    product = hsic(a, a) * hsic(b, b)
    return float(hsic(a, b) / (np.sqrt(product) + EPSILON)) if product > 0 else np.nan


def _unbiased_hsic(a: Float[np.ndarray, "N F"], b: Float[np.ndarray, "N G"]) -> float:
    """Computes the HSIC of the kernels' matrices without their diagonals, from the features alone."""
    size = len(a)
    lengths_a, lengths_b = np.square(a).sum(axis=1), np.square(b).sum(axis=1)
    rows_a, rows_b = (x @ x.sum(axis=0) - lengths for x, lengths in ((a, lengths_a), (b, lengths_b)))
    trace = np.square(a.T @ b).sum() - (lengths_a * lengths_b).sum()
    sums = rows_a.sum() * rows_b.sum() / ((size - 1) * (size - 2))
    return (trace + sums - 2 * (rows_a * rows_b).sum() / (size - 2)) / (size * (size - 3))


def principal_components(latents: Float[np.ndarray, "B h w C"], count: int = 3) -> Float[np.ndarray, "B h w count"]:
    """Returns the first principal components of latents, fitted in float64 to all positions of all images together, mean 0.

    The sign is the one with which the longer tail is positive, so neither the order of the channels nor any rotation of them
    changes the result.

    Reference: https://github.com/End2End-Diffusion/REPA-E/issues/13.
    """
    latents = np.asarray(latents, np.float64)
    if latents.ndim != 4 or latents.shape[-1] < count:
        raise ValueError(
            f"latents have shape {list(latents.shape)}; allowed: [B, h, w, C] with C >= {count} to have {count} components"
        )
    tokens = latents.reshape(-1, latents.shape[-1])
    tokens = tokens - tokens.mean(axis=0)
    scores = tokens @ np.linalg.eigh(tokens.T @ tokens)[1][:, ::-1][:, :count]
    scores *= np.where((scores**3).sum(axis=0) < 0, -1, 1)
    return scores.reshape(*latents.shape[:-1], count)
