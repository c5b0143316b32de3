"""Inception score from a classifier's logits, in splits of consecutive samples."""

import numpy as np
from jaxtyping import Float
from scipy import special

SPLIT_SIZE = 5000  # published scores have ten splits of 50,000 samples


class RunningInceptionScore:
    """Inception score of logits that come in batches, in splits of consecutive samples, of which the last may be shorter.

    A few sums are kept per split, all in float64.

    Reference: Salimans et al., arXiv 1606.03498, sec. 4; ADM `evaluations/evaluator.py` `compute_inception_score`, whose
      splits are of 5000 samples, and whose logits lack the bias of the last layer.
    """

    def __init__(self, split_size: int = SPLIT_SIZE):
        if split_size < 1:
            raise ValueError(f"split_size is {split_size}; allowed: 1 and above")
        self._split_size = split_size
        self._scores: list[float] = []
        self._start_split()

    def _start_split(self) -> None:
        self._count, self._sum, self._sum_of_p_log_p = 0, np.float64(0), 0.0

    def update(self, logits: Float[np.ndarray, "N K"]) -> None:
        """Adds the logits of the next samples; raises ValueError if they are no matrix or not all finite."""
        logits = np.asarray(logits, np.float64)
        if logits.ndim != 2:
            raise ValueError(f"logits have shape {list(logits.shape)}; allowed: [N, K], one row per image")
        if not np.isfinite(logits).all():
            raise ValueError("some logits are not finite; look for nan in the images, or use float32 in the network")
        while len(logits):
            in_split, logits = np.split(logits, [self._split_size - self._count])
            log_p = special.log_softmax(in_split, axis=1)
            p = np.exp(log_p)
            self._count += len(in_split)
            self._sum = self._sum + p.sum(axis=0)
            self._sum_of_p_log_p += (p * log_p).sum()
            if self._count == self._split_size:
                self._scores.append(self._split_score())
                self._start_split()

    def _split_score(self) -> float:
        """Computes exp of the mean KL divergence of p from its mean over the split."""
        mean = self._sum / self._count
        return np.exp(self._sum_of_p_log_p / self._count - (mean * np.log(mean.clip(min=np.finfo(np.float64).tiny))).sum())

    def result(self) -> tuple[float, float]:
        """Returns the mean (from 1 to the number of classes) and standard deviation over splits; ValueError without logits."""
        scores = self._scores + ([self._split_score()] if self._count else [])
        if not scores:
            raise ValueError("there are no logits; an inception score needs at least those of one image")
        return float(np.mean(scores)), float(np.std(scores))
