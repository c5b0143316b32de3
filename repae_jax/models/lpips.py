"""LPIPS with VGG16 features: a learned perceptual distance between images.

Reference: Zhang et al. 2018 (arXiv 1801.03924), version 0.1, in the form vendored by taming-transformers.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from repae_jax.models.fused_ops import max_pool

# channels of VGG16's convolutions; each tuple ends before a max pooling and gives one feature map
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


def unit_length(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns feature maps scaled to unit length at each position, in float32."""
    x = x.astype(jnp.float32)
    # 1e-20 keeps the root's gradient finite where every feature is zero
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-20)
    return x * (1 / (norm + 1e-10))


def map_distance(x: Float[Array, "B H W C"], y: Float[Array, "B H W C"], weights: Float[Array, " C"]) -> Float[Array, " B"]:
    """Returns the weighted squared difference of two unit-length feature maps, averaged over positions."""
    return jnp.mean(jnp.sum(jnp.square(unit_length(x) - unit_length(y)) * weights, axis=-1), axis=(1, 2))


class LPIPS(nn.Module):
    """Perceptual distance of image pairs."""

    dtype: DTypeLike = jnp.float32  # compute dtype of the convolutions; normalization and distances are float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], others: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        """Returns the distance of each pair in [-1, 1], of 16 pixels a side or more: the sum of five stages' `map_distance`.

        Nothing is kept for a side that needs no gradient, such as real images.
        """
        x, y = (((side - SHIFT) / SCALE).astype(self.dtype) for side in (images, others))
        distance = jnp.float32(0)
        for i, widths in enumerate(VGG16_STAGES):
            for j, width in enumerate(widths):
                conv = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv_{i}_{j}")
                x, y = nn.relu(conv(x)), nn.relu(conv(y))
            weights = self.param(f"linear_{i}", nn.initializers.uniform(1.0), (widths[-1],))
            distance += map_distance(x, y, weights)
            x, y = max_pool(x), max_pool(y)
        return distance
