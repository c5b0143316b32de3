"""Batches of one size, so that one compiled program serves all."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def run_padded(function: Callable, arrays: Sequence[np.ndarray], size: int, placement: jax.sharding.Sharding) -> Any:
    """Runs a function of batches that are padded, so that one program serves all; returns numpy arrays without the padding."""
    count = len(arrays[0])
    padded = [np.pad(array, [(0, size - count)] + [(0, 0)] * (array.ndim - 1)) for array in arrays]
    return jax.tree.map(lambda x: np.asarray(x)[:count], function(*jax.device_put(padded, placement)))
