"""AutoencoderKL: the convolutional VAE of latent diffusion, channels last.

Reference: CompVis latent-diffusion `ldm/modules/diffusionmodules/model.py`, as used by SD-VAE, IN-VAE and VA-VAE, and,
without the quantization convolutions, by the VAEs of FLUX and Stable Diffusion 3.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from repae_jax.models.fused_ops import Conv, DeferredBias, GroupNorm, UpsampleConv, recompute_norms
from repae_jax.models.layers import torch_default_init


@struct.dataclass
class DiagonalGaussian:
    """Posterior q(z|x), independent per entry; float32."""

    mean: Float[Array, "B h w C"]
    logvar: Float[Array, "B h w C"]  # clamped to [-30, 20]; minus infinity of an encoder that is not random

    @property
    def std(self) -> Float[Array, "B h w C"]:
        """Standard deviation."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, noise: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Returns mean + std * noise; noise ~ N(0, 1)."""
        return self.mean + self.std * noise

    def mode(self) -> Float[Array, "B h w C"]:
        """Returns the mean."""
        return self.mean

    def kl(self) -> Float[Array, " B"]:
        """Returns KL(q || N(0, 1)) of each image in nats, summed over positions and channels."""
        return 0.5 * jnp.sum(jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar, axis=(1, 2, 3))


class ResnetBlock(nn.Module):
    """Twice group norm, SiLU and a 3x3 convolution, plus the input, through a 1x1 convolution where the widths differ."""

    features: int
    norm_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: DeferredBias) -> DeferredBias:
        normed = GroupNorm(self.norm_groups, self.dtype, name="norm1")(x)
        h = Conv(self.features, 3, self.dtype, with_moments=True, name="conv1")(nn.silu(normed))
        normed = GroupNorm(self.norm_groups, self.dtype, name="norm2")(h)
        h = Conv(self.features, 3, self.dtype, name="conv2")(nn.silu(normed))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, self.dtype, name="nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    norm_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: DeferredBias) -> DeferredBias:
        b, h, w, c = x.shape
        normed = GroupNorm(self.norm_groups, self.dtype, name="norm")(x)
        q, k, v = (Conv(c, 1, self.dtype, name=name)(normed).to_array().reshape(b, h * w, 1, c) for name in ("q", "k", "v"))
        y = jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c)
        return x + Conv(c, 1, self.dtype, name="proj_out")(y)


class EncoderDecoderBase(nn.Module):
    """Sizes, blocks and the middle of an encoder or decoder; the attributes are AutoencoderKL's."""

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention_levels: Sequence[int]
    norm_groups: int
    remat: bool
    dtype: DTypeLike

    def _block(self, name, features):
        block = nn.remat(ResnetBlock) if self.remat else recompute_norms(ResnetBlock)
        return block(features, self.norm_groups, self.dtype, name=name)

    def _level(self, h, name, level, num_blocks):
        for i in range(num_blocks):
            h = self._block(f"{name}_{level}_block_{i}", self.channels * self.channel_multipliers[level])(h)
            if level in self.attention_levels:
                h = AttnBlock(self.norm_groups, self.dtype, name=f"{name}_{level}_attn_{i}")(h)
        return h

    def _middle(self, h):
        h = self._block("mid_block_1", h.shape[-1])(h)
        h = AttnBlock(self.norm_groups, self.dtype, name="mid_attn_1")(h)
        return self._block("mid_block_2", h.shape[-1])(h)

    def _head(self, h, features):
        def head(self, h):
            normed = GroupNorm(self.norm_groups, self.dtype, name="norm_out")(h)
            return Conv(features, 3, self.dtype, name="conv_out")(nn.silu(normed))

        return recompute_norms(head)(self, h).to_array()


class Encoder(EncoderDecoderBase):
    """Maps images to the posterior's moments, 2^(levels - 1) times smaller."""

    out_channels: int = 8

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        h = Conv(self.channels, 3, self.dtype, name="conv_in")(x)
        for level in range(len(self.channel_multipliers)):
            h = self._level(h, "down", level, self.num_res_blocks)
            if level + 1 < len(self.channel_multipliers):
                padding = ((0, 1), (0, 1))  # at the far edges only, as the published convolution pads
                h = Conv(h.shape[-1], 3, self.dtype, 2, padding, name=f"down_{level}_downsample")(h)
        return self._head(self._middle(h), self.out_channels)


class Decoder(EncoderDecoderBase):
    """Maps latents to images, 2^(levels - 1) times larger."""

    @nn.compact
    def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        h = Conv(self.channels * self.channel_multipliers[-1], 3, self.dtype, name="conv_in")(z)
        h = self._middle(h)
        for level in reversed(range(len(self.channel_multipliers))):
            h = self._level(h, "up", level, self.num_res_blocks + 1)
            if level > 0:
                h = UpsampleConv(self.dtype, name=f"up_{level}_upsample")(h)
        return self._head(h, 3)


class AutoencoderKL(nn.Module):
    """VAE with a diagonal Gaussian posterior.

    Parameters are float32; `dtype` is the compute dtype, with group-norm statistics, softmax and the posterior in float32.
    """

    latent_channels: int
    channels: int = 128  # base width
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # width of each level over the base
    num_res_blocks: int = 2  # per encoder level; one more in the decoder
    attention_levels: tuple[int, ...] = ()  # 0 is full resolution; the middle has self-attention anyway
    norm_groups: int = 32  # divides every width
    quant_convs: bool = True  # 1x1 convolutions of the moments and of the latents, between encoder and decoder
    feature_dim: int | None = None  # width of the tokens that `project` maps latents to, for VA-VAE's VF loss
    remat: bool = False  # recompute whole residual blocks in the backward pass, not only their norms and activations
    dtype: DTypeLike = jnp.float32

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along a side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def setup(self):
        for multiplier in self.channel_multipliers:
            width = self.channels * multiplier
            if width % self.norm_groups:
                origin = f"(channels={self.channels} x multiplier {multiplier})"
                raise ValueError(f"norm_groups={self.norm_groups} does not divide the width {width} {origin}")
        levels = len(self.channel_multipliers)
        if not all(0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels={tuple(self.attention_levels)} must lie in 0..{levels - 1}")
        c = self.latent_channels
        names = ("channels", "channel_multipliers", "num_res_blocks", "attention_levels", "norm_groups", "remat", "dtype")
        shared = {name: getattr(self, name) for name in names}
        self.encoder = Encoder(**shared, out_channels=2 * c)
        self.decoder = Decoder(**shared)
        if self.quant_convs:
            self.quant_conv = Conv(2 * c, 1, self.dtype)
            self.post_quant_conv = Conv(c, 1, self.dtype)
        if self.feature_dim is not None:
            kernel_init = torch_default_init(c)["kernel_init"]
            self.vf_projection = nn.Dense(self.feature_dim, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)

    def encode(self, images: Float[Array, "B H W 3"]) -> DiagonalGaussian:
        """Returns the posterior of images in [-1, 1], whose height and width `factor` divides."""
        moments = self.encoder(images.astype(self.dtype))
        if self.quant_convs:
            moments = self.quant_conv(moments).to_array()
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return DiagonalGaussian(mean=mean, logvar=jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Returns the float32 images of un-normalized latents, about [-1, 1], not clipped."""
        latents = latents.astype(self.dtype)
        if self.quant_convs:
            latents = self.post_quant_conv(latents).to_array()
        return self.decoder(latents).astype(jnp.float32)

    def project(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B h w F"]:
        """Returns latents as an encoder's tokens, float32, F = feature_dim."""
        return self.vf_projection(latents.astype(self.dtype)).astype(jnp.float32)

    def __call__(self, images: Float[Array, "B H W 3"], noise: Float[Array, "B h w C"]) -> tuple[Array, DiagonalGaussian]:
        """Returns the reconstruction from latents sampled with the given noise, and the posterior."""
        posterior = self.encode(images)
        if self.is_initializing() and self.feature_dim is not None:
            self.project(noise)
        return self.decode(posterior.sample(noise)), posterior
