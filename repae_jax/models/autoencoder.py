"""AutoencoderKL: the convolutional VAE of latent diffusion, channels last.

Reference: CompVis latent-diffusion `ldm/modules/diffusionmodules/model.py`, as used by SD-VAE, IN-VAE and VA-VAE, and,
without the quantisation convolutions, by the VAEs of FLUX and Stable Diffusion 3.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from repae_jax.models.convolution import CONVOLVED, NHWC, channel_moments, conv3x3, measured_conv3x3
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


@struct.dataclass
class Shifted:
    """x + shift, not added yet: biases of convolutions wait for the next group norm.

    There a shift is a few numbers an image, and its gradient comes with that of the mean. Added where the convolution is, it
    would cost a sum over all positions in the backward pass.

    Attributes:
      x: [B, H, W, C] in the compute dtype.
      shift: float32 [C].
      moments: `channel_moments` of x; None if they are not known.
    """

    x: jax.Array
    shift: jax.Array
    moments: jax.Array | None = None

    def __add__(self, other):
        return Shifted(self.x + other.x, self.shift + other.shift)

    def added(self):
        """[B, H, W, C] in the compute dtype."""
        return (self.x + self.shift).astype(self.x.dtype)


class Conv(nn.Module):
    """Convolution with torch's default initialisation: [B, H, W, C], an array or Shifted -> Shifted [B, H', W', features].

    Attributes:
      measured: give the result's moments, too; of advantage where a group norm is its only use.

    Raises:
      ValueError: if `measured`, but not 3x3 with stride 1 and 'SAME' padding.
    """

    features: int
    kernel_size: int
    dtype: jnp.dtype
    strides: int = 1
    padding: str | Sequence[tuple[int, int]] = "SAME"
    measured: bool = False

    @nn.compact
    def __call__(self, x):
        channels = (x.x if isinstance(x, Shifted) else x).shape[-1]
        init = torch_default_init(self.kernel_size**2 * channels)
        kernel = self.param("kernel", init["kernel_init"], (self.kernel_size, self.kernel_size, channels, self.features))
        shift = self.param("bias", init["bias_init"], (self.features,))
        if isinstance(x, Shifted) and self.kernel_size == 1:
            x, shift = x.x, shift + jnp.dot(x.shift, kernel[0, 0], precision="highest")
        elif isinstance(x, Shifted):
            x = x.added()
        strides = (self.strides, self.strides)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        plain = (self.kernel_size, self.strides, self.padding) == (3, 1, "SAME")
        if self.measured and not plain:
            found = f"{self.kernel_size}, {self.strides}, {self.padding!r}"
            raise ValueError(f"measured needs kernel_size=3, strides=1, padding='SAME', not {found}")
        if self.measured:
            x, moments = measured_conv3x3(x, kernel)
            return Shifted(x, shift, moments)
        if plain:
            return Shifted(conv3x3(x, kernel), shift)
        return Shifted(jax.lax.conv_general_dilated(x, kernel, strides, self.padding, dimension_numbers=NHWC), shift)


def group_stats(x, groups):
    """Mean and variance of each image's groups of channels.

    Args:
      x: Shifted [B, H, W, C].
      groups: how many; divides C.

    Returns:
      mean, var: float32 [B, 1, 1, C], the same for all channels of a group.
    """
    # gradients need x alone, and sum nothing again
    mean, square = jax.checkpoint(channel_moments)(x.x) if x.moments is None else x.moments
    moments = jnp.stack([mean + x.shift, square + x.shift * (2 * mean + x.shift)])
    moments = moments.reshape(2, len(mean), groups, -1).mean(-1)
    mean, square = jnp.repeat(moments, len(x.shift) // groups, axis=-1)[:, :, None, None]
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)


class GroupNorm(nn.Module):
    """(x Shifted [B, H, W, C], mean, var of `group_stats`) -> [B, H, W, C], normalised, scaled, biased by channel; eps 1e-6."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mean, var):
        scale = self.param("scale", nn.initializers.ones, x.shift.shape)
        bias = self.param("bias", nn.initializers.zeros, x.shift.shape)
        return ((x.x - (mean - x.shift)) * (jax.lax.rsqrt(var + 1e-6) * scale) + bias).astype(self.dtype)


def norm_silu_conv(module, x, features, norm, name, measured=False):
    """GroupNorm, SiLU and a 3x3 convolution; call inside a compact method.

    Gradients need x and its statistics alone: what is between is many times the size, in float32, and cheap to compute again.

    Args:
      module: whose method this is called in.
      x: Shifted [B, H, W, C].
      features: of the result, Shifted too.
      norm: name of the normalisation.
      name: of the convolution.
      measured: see `Conv`.
    """

    def run(module, x, mean, var):
        x = GroupNorm(module.dtype, name=norm)(x, mean, var)
        return Conv(features, 3, module.dtype, measured=measured, name=name)(nn.silu(x))

    run = nn.remat(run, policy=jax.checkpoint_policies.save_only_these_names(CONVOLVED))
    return run(module, x, *group_stats(x, module.norm_groups))


def repeated_conv(x, kernel):
    """Nearest-neighbor upsampling by 2 and a 3x3 convolution: [B, H, W, C], float32 [3, 3, C, D] -> [B, 2H, 2W, D]."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return conv3x3(x, kernel.astype(x.dtype))


def transposed_conv(x, kernel):
    """`repeated_conv` with 4 in place of 9 multiplications: taps that fall on copies of one pixel are added first."""
    taps = jnp.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], jnp.float32)
    return _transposed(x, jnp.einsum("ua,vb,abcd->uvdc", taps, taps, kernel, precision="highest").astype(x.dtype))


def _strided(y, kernel):
    """[B, 2H, 2W, D], [4, 4, D, C] -> [B, H, W, C]."""
    return jax.lax.conv_general_dilated(y, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=NHWC)


@jax.custom_vjp
def _transposed(x, kernel):
    """The transpose of `_strided`. XLA's gradient of a transposed convolution would mirror the result first."""
    b, h, w, _ = x.shape
    y = jax.ShapeDtypeStruct((b, 2 * h, 2 * w, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(lambda y: _strided(y, kernel), y)(x)[0]


def _transposed_backward(saved, gradient):
    x, kernel = saved
    _, to_kernel = jax.vjp(functools.partial(_strided, gradient), kernel)
    return _strided(gradient, kernel), to_kernel(x)[0]


_transposed.defvjp(lambda x, kernel: (_transposed(x, kernel), (x, kernel)), _transposed_backward)


class UpsampleConv(nn.Module):
    """Twice the sides, by nearest neighbors, and a 3x3 convolution with torch's default initialisation; Shifted -> Shifted.

    On TPUs it is one transposed convolution; CPUs take four times as long for that.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = x.added()
        c = x.shape[-1]
        init = torch_default_init(9 * c)
        kernel = self.param("kernel", init["kernel_init"], (3, 3, c, c))
        bias = self.param("bias", init["bias_init"], (c,))
        return Shifted(jax.lax.platform_dependent(x, kernel, tpu=transposed_conv, default=repeated_conv), bias)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, plus the (1x1 projected) input: [B, H, W, C] -> [B, H, W, features], Shifted."""

    features: int
    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = norm_silu_conv(self, x, self.features, "norm1", "conv1", measured=True)
        y = norm_silu_conv(self, y, self.features, "norm2", "conv2")
        if len(x.shift) != self.features:
            x = Conv(self.features, 1, self.dtype, name="nin_shortcut")(x)
        return x + y


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual. Shifted [B, H, W, C] -> the same."""

    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.x.shape
        normed = GroupNorm(self.dtype, name="norm")(x, *group_stats(x, self.norm_groups))
        q, k, v = (Conv(c, 1, self.dtype, name=name)(normed).added().reshape(b, h * w, 1, c) for name in ("q", "k", "v"))
        y = jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c)
        return x + Conv(c, 1, self.dtype, name="proj_out")(y)


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
        x = self._block("mid_block_1", len(x.shift))(x)
        x = self._attention("mid_attn_1")(x)
        return self._block("mid_block_2", len(x.shift))(x)

    def _head(self, x, features):
        return norm_silu_conv(self, x, features, "norm_out", "conv_out").added()


class Encoder(_Half):
    """[B, H, W, 3] -> [B, H/f, W/f, out_channels], f = 2^(levels - 1)."""

    out_channels: int = 8

    @nn.compact
    def __call__(self, x):
        x = Conv(self.channels, 3, self.dtype, name="conv_in")(x)
        for level, multiplier in enumerate(self.channel_multipliers):
            for i in range(self.num_res_blocks):
                x = self._block(f"down_{level}_block_{i}", self.channels * multiplier)(x)
                if level in self.attention_levels:
                    x = self._attention(f"down_{level}_attn_{i}")(x)
            if level + 1 < len(self.channel_multipliers):
                # asymmetric padding at the far edges only, as the published convolution pads
                padding = ((0, 1), (0, 1))
                x = Conv(len(x.shift), 3, self.dtype, 2, padding, name=f"down_{level}_downsample")(x)
        return self._head(self._middle(x), self.out_channels)


class Decoder(_Half):
    """[B, h, w, C] -> [B, h*f, w*f, 3]."""

    @nn.compact
    def __call__(self, z):
        x = Conv(self.channels * self.channel_multipliers[-1], 3, self.dtype, name="conv_in")(z)
        x = self._middle(x)
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            for i in range(self.num_res_blocks + 1):
                x = self._block(f"up_{level}_block_{i}", self.channels * multiplier)(x)
                if level in self.attention_levels:
                    x = self._attention(f"up_{level}_attn_{i}")(x)
            if level > 0:
                x = nn.remat(UpsampleConv)(self.dtype, name=f"up_{level}_upsample")(x)
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
        levels = len(self.channel_multipliers)
        if not all(0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels={tuple(self.attention_levels)} must lie in 0..{levels - 1}")
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
            self.quant_conv = Conv(2 * c, 1, self.dtype)
            self.post_quant_conv = Conv(c, 1, self.dtype)
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
            moments = self.quant_conv(moments).added()
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
            latents = self.post_quant_conv(latents).added()
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
