"""AutoencoderKL: the convolutional VAE of latent diffusion, channels last.

Reference: CompVis latent-diffusion `ldm/modules/diffusionmodules/model.py`, as used by SD-VAE, IN-VAE and VA-VAE, and,
without the quantisation convolutions, by the VAEs of FLUX and Stable Diffusion 3.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from repae_jax.models.layers import torch_default_init


@struct.dataclass
class DiagonalGaussian:
    """Posterior q(z|x), independent per entry.

    Attributes:
      mean: float32 [B, h, w, C].
      logvar: float32 [B, h, w, C], clamped to [-30, 20].
    """

    mean: jax.Array
    logvar: jax.Array

    @property
    def std(self):
        """Standard deviation, [B, h, w, C]."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, noise):
        """mean + std * noise, noise ~ N(0, 1) of the same shape."""
        return self.mean + self.std * noise

    def mode(self):
        """The mean."""
        return self.mean

    def kl(self):
        """KL(q || N(0, 1)) of each image: [B], summed over positions and channels, in nats."""
        return 0.5 * jnp.sum(jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar, axis=(1, 2, 3))


def conv(x, features, kernel, name, dtype, **kwargs):
    """Convolution of NHWC input with torch's default initialisation; call inside a compact method."""
    init = torch_default_init(kernel * kernel * x.shape[-1])
    return nn.Conv(features, (kernel, kernel), dtype=dtype, name=name, **init, **kwargs)(x)


def norm_silu_conv(module, x, features, norm, name):
    """GroupNorm, SiLU and a 3x3 convolution with torch's default initialisation; call inside a compact method.

    Gradients need x alone: what is between is many times its size, in float32, and cheap to compute again.

    Args:
      module: whose method this is called in.
      x: [B, H, W, C].
      features: of the result.
      norm: name of the normalisation.
      name: of the convolution.
    """

    def run(module, x):
        groups, dtype = module.norm_groups, module.dtype
        x = nn.GroupNorm(num_groups=groups, epsilon=1e-6, dtype=dtype, name=norm)(x)
        return conv(nn.silu(x), features, 3, name, dtype)

    return nn.remat(run)(module, x)


def upsample_conv(module, x, name):
    """Twice the sides, by nearest neighbors, and a 3x3 convolution; gradients need x alone. Call inside a compact method."""

    def run(module, x):
        return conv(x.repeat(2, axis=1).repeat(2, axis=2), x.shape[-1], 3, name, module.dtype)

    return nn.remat(run)(module, x)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, plus the (1x1 projected) input. [B, H, W, C] -> [B, H, W, features]."""

    features: int
    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = norm_silu_conv(self, x, self.features, "norm1", "conv1")
        y = norm_silu_conv(self, y, self.features, "norm2", "conv2")
        if x.shape[-1] != self.features:
            x = conv(x, self.features, 1, "nin_shortcut", self.dtype)
        return x + y


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual. [B, H, W, C] -> [B, H, W, C]."""

    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        normed = nn.GroupNorm(num_groups=self.norm_groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        q, k, v = (conv(normed, c, 1, name, self.dtype).reshape(b, h * w, 1, c) for name in ("q", "k", "v"))
        y = jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c)
        return x + conv(y, c, 1, "proj_out", self.dtype)


class _Half(nn.Module):
    """What encoder and decoder share: the sizes and the middle."""

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention_levels: Sequence[int]
    norm_groups: int
    remat: bool
    dtype: jnp.dtype

    def _block(self, name, features):
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        return block(features, self.norm_groups, self.dtype, name=name)

    def _attention(self, name):
        return AttnBlock(self.norm_groups, self.dtype, name=name)

    def _middle(self, x):
        x = self._block("mid_block_1", x.shape[-1])(x)
        x = self._attention("mid_attn_1")(x)
        return self._block("mid_block_2", x.shape[-1])(x)

    def _head(self, x, features):
        return norm_silu_conv(self, x, features, "norm_out", "conv_out")


class Encoder(_Half):
    """[B, H, W, 3] -> [B, H/f, W/f, out_channels], f = 2^(levels - 1)."""

    out_channels: int = 8

    @nn.compact
    def __call__(self, x):
        x = conv(x, self.channels, 3, "conv_in", self.dtype)
        for level, multiplier in enumerate(self.channel_multipliers):
            for i in range(self.num_res_blocks):
                x = self._block(f"down_{level}_block_{i}", self.channels * multiplier)(x)
                if level in self.attention_levels:
                    x = self._attention(f"down_{level}_attn_{i}")(x)
            if level + 1 < len(self.channel_multipliers):
                # asymmetric padding at the far edges only, as the published convolution pads
                padding = ((0, 1), (0, 1))
                x = conv(x, x.shape[-1], 3, f"down_{level}_downsample", self.dtype, strides=2, padding=padding)
        return self._head(self._middle(x), self.out_channels)


class Decoder(_Half):
    """[B, h, w, C] -> [B, h*f, w*f, 3]."""

    @nn.compact
    def __call__(self, z):
        x = conv(z, self.channels * self.channel_multipliers[-1], 3, "conv_in", self.dtype)
        x = self._middle(x)
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            for i in range(self.num_res_blocks + 1):
                x = self._block(f"up_{level}_block_{i}", self.channels * multiplier)(x)
                if level in self.attention_levels:
                    x = self._attention(f"up_{level}_attn_{i}")(x)
            if level > 0:
                x = upsample_conv(self, x, f"up_{level}_upsample")
        return self._head(x, 3)


class AutoencoderKL(nn.Module):
    """VAE with a diagonal Gaussian posterior.

    Parameters are float32; `dtype` is the compute dtype, with group-norm statistics, softmax and the posterior in float32.

    Attributes:
      latent_channels: C of the latents.
      channels: base width.
      channel_multipliers: width of each level over the base; the spatial factor is 2^(levels - 1).
      num_res_blocks: residual blocks per encoder level (one more in the decoder).
      attention_levels: levels (0 = full resolution) with self-attention besides the middle.
      norm_groups: group-norm groups; divides every width.
      quant_convs: 1x1 convolutions of the moments and of the latents, between encoder and decoder.
      feature_dim: width of the encoder's tokens that `project` maps latents to, for VA-VAE's VF loss; None is no such map.
      remat: recompute residual blocks in the backward pass.
      dtype: compute dtype.
    """

    latent_channels: int
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    norm_groups: int = 32
    quant_convs: bool = True
    feature_dim: int | None = None
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def factor(self):
        """Image pixels per latent pixel along a side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def setup(self):
        for multiplier in self.channel_multipliers:
            if (self.channels * multiplier) % self.norm_groups:
                raise ValueError(
                    f"norm_groups={self.norm_groups} does not divide the width {self.channels * multiplier} "
                    f"(channels={self.channels} x multiplier {multiplier})"
                )
        fields = {
            name: getattr(self, name)
            for name in (
                "channels",
                "channel_multipliers",
                "num_res_blocks",
                "attention_levels",
                "norm_groups",
                "remat",
                "dtype",
            )
        }
        c = self.latent_channels
        self.encoder = Encoder(**fields, out_channels=2 * c)
        self.decoder = Decoder(**fields)
        if self.quant_convs:
            self.quant_conv = nn.Conv(2 * c, (1, 1), dtype=self.dtype, **torch_default_init(2 * c))
            self.post_quant_conv = nn.Conv(c, (1, 1), dtype=self.dtype, **torch_default_init(c))
        if self.feature_dim is not None:
            kernel_init = torch_default_init(c)["kernel_init"]
            self.vf_projection = nn.Dense(self.feature_dim, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)

    def encode(self, images):
        """Posterior of images.

        Args:
          images: [B, H, W, 3] in [-1, 1], H and W divisible by `factor`.

        Returns:
          DiagonalGaussian, [B, H/factor, W/factor, C].
        """
        moments = self.encoder(images.astype(self.dtype))
        if self.quant_convs:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return DiagonalGaussian(mean=mean, logvar=jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents):
        """Images of latents.

        Args:
          latents: [B, h, w, C], un-normalised.

        Returns:
          float32 [B, h * factor, w * factor, 3], about [-1, 1], not clipped.
        """
        latents = latents.astype(self.dtype)
        if self.quant_convs:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def project(self, latents):
        """Latents [B, h, w, C] as an encoder's tokens: float32 [B, h, w, feature_dim]."""
        return self.vf_projection(latents.astype(self.dtype)).astype(jnp.float32)

    def __call__(self, images, noise):
        """Encode, sample with the given noise [B, h, w, C], decode: (recon, posterior)."""
        posterior = self.encode(images)
        if self.is_initializing() and self.feature_dim is not None:
            self.project(noise)
        return self.decode(posterior.sample(noise)), posterior
