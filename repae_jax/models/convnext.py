"""ConvNeXt V2, the only convolutional network among the feature spaces.

References: Woo et al., arXiv 2301.00808. `transformers`' `ConvNextV2Model` and timm's `convnextv2_base` are those of parity.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from repae_jax.models import layers

EPSILON = 1e-6  # of the layer norms, and of the response norm


class ResponseNorm(nn.Module):
    """Global response normalization: x + scale * x * n + bias; n is a channel's norm over the image by their mean."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        scale, bias = (self.param(name, nn.initializers.zeros, (x.shape[-1],)) for name in ("scale", "bias"))
        norms = jnp.sqrt(jnp.square(x).sum(axis=(1, 2), keepdims=True))
        return x + scale * (x * (norms / (norms.mean(axis=-1, keepdims=True) + EPSILON))) + bias


class ConvNextBlock(nn.Module):
    """Residual block: depthwise convolution, MLP with response norm; returns (x, None), as `nn.scan` takes it."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W C"], None]:
        width = x.shape[-1]
        y = nn.Conv(width, (7, 7), padding=3, feature_group_count=width, name="depthwise")(x)
        y = nn.LayerNorm(epsilon=EPSILON, name="norm")(y)
        y = jax.nn.gelu(nn.Dense(4 * width, name="fc1")(y), approximate=False)
        return x + nn.Dense(width, name="fc2")(ResponseNorm(name="response_norm")(y)), None


class ConvNextV2(nn.Module):
    """Convolutional network in float32; returns one vector per image, the mean over positions without a norm after it."""

    depths: Sequence[int]
    widths: Sequence[int]

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
        x = nn.Conv(self.widths[0], (4, 4), 4, "VALID", name="stem")(images)
        x = nn.LayerNorm(epsilon=EPSILON, name="stem_norm")(x)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths)):
            if stage:
                x = nn.LayerNorm(epsilon=EPSILON, name=f"reduce{stage}_norm")(x)
                x = nn.Conv(width, (2, 2), 2, "VALID", name=f"reduce{stage}")(x)
            x, _ = layers.scan_blocks(ConvNextBlock, depth, name=f"stage{stage}")(x)
        return x.mean(axis=(1, 2))
