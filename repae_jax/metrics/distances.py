"""Distances between two sets of features, block by block, so that they need not fit in memory together."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK_SIZE = 5000  # a block of distances takes 100 MB

Block = tuple[Float[Array, "b F"], Float[Array, " b"]]  # features and their squared norms


def check_same_width(reference: Float[np.ndarray, "M F"], samples: Float[np.ndarray, "N F"]) -> None:
    """Raises ValueError unless both are matrices with one feature per column."""
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features have shapes {list(reference.shape)} and {list(samples.shape)}; allowed: [M, F] and [N, F] with one F; "
            "take both from the same feature network"
        )


def centered_blocks(features: Float[np.ndarray, "N F"], center: Float[np.ndarray, " F"], block_size: int) -> list[Block]:
    """Returns the centered features in float32, in blocks of one size; the last is padded, with infinite norms."""
    size, blocks = min(block_size, len(features)), []
    for first in range(0, len(features), size):
        block = (features[first : first + size] - center).astype(np.float32)
        if not np.isfinite(block).all():
            raise ValueError("some features are not finite; look for nan in the images, or use float32 in the network")
        missing = size - len(block)
        norms = np.einsum("nf,nf->n", block, block, dtype=np.float64).astype(np.float32)
        block, norms = np.pad(block, ((0, missing), (0, 0))), np.pad(norms, (0, missing), constant_values=np.inf)
        blocks.append((jax.device_put(block), jax.device_put(norms)))
    return blocks


def squared_distances(a: Block, b: Block) -> Float[Array, "n m"]:
    """Computes the squared distances between the features of two blocks."""
    (a_features, a_norms), (b_features, b_norms) = a, b
    product = jnp.dot(a_features, b_features.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(a_norms[:, None] + b_norms[None] - 2 * product, 0)
