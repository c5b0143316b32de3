"""PatchGAN discriminator with batch norm.

Reference: pix2pix's NLayerDiscriminator as vendored by taming-transformers.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from repae_jax.models.channel_stats import ChannelStats, batch_stats, update_running
from repae_jax.models.layers import Conv, torch_default_init

normal_02 = nn.initializers.normal(0.02)


class BatchNorm(nn.Module):
    """Batch norm that always normalizes with batch statistics, in float32; running statistics are kept for export only.

    Statistics are those of the global batch. The published code's are each GPU's own, because only its SiT is converted
    to synchronized batch norm.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        c = x.shape[-1]
        scale = self.param("scale", lambda key, shape: 1 + normal_02(key, shape), (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (c,), jnp.float32)
        stats = batch_stats(x)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            running = update_running(ChannelStats(mean.value, var.value), stats, x.size // c, self.momentum)
            mean.value, var.value = running.mean, running.var
        return (x.astype(jnp.float32) - stats.mean) * jax.lax.rsqrt(stats.var + self.epsilon) * scale + bias


class PatchDiscriminator(nn.Module):
    """PatchGAN: one logit for each of many overlapping patches."""

    channels: int = 64  # width of the first layer; doubles per layer up to 8 times it
    num_layers: int = 3  # stride-2 convolutions
    dtype: DTypeLike = jnp.float32  # compute dtype of the convolutions

    @property
    def min_image_size(self) -> int:
        """Smallest image side that leaves at least one logit."""
        return 2**self.num_layers * 3  # each of the two stride-1 convolutions (kernel 4, padding 1) removes one pixel

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w 1"]:
        """Returns float32 logits of images in [-1, 1]; positive stands for real."""
        activate = functools.partial(nn.leaky_relu, negative_slope=0.2)

        def conv(x, features, stride, bias, name):
            init = {"kernel_init": normal_02, "bias_init": torch_default_init(16 * x.shape[-1])["bias_init"]}
            return Conv(features, (4, 4), stride, padding=1, use_bias=bias, dtype=self.dtype, name=name, **init)(x)

        x = activate(conv(images.astype(self.dtype), self.channels, 2, True, "conv_0"))
        for i in range(1, self.num_layers + 1):
            stride = 2 if i < self.num_layers else 1
            x = conv(x, self.channels * min(2**i, 8), stride, False, f"conv_{i}")
            x = activate(BatchNorm(name=f"norm_{i}")(x)).astype(self.dtype)
        return conv(x, 1, 1, True, f"conv_{self.num_layers + 1}").astype(jnp.float32)
