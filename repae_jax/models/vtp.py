"""VTP's tokenizer: a vision transformer pre-trained with images, texts and reconstruction, a bottleneck, and a ViT decoder.

Reference: VTP (arXiv 2512.13687), `vtp/models` of MiniMax-AI/VTP, whose blocks are DINOv3's with RMSNorm in the encoder, SwiGLU
and rotary positions in bfloat16.
"""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from repae_jax.models import layers
from repae_jax.models.autoencoder import DiagonalGaussian
from repae_jax.models.point_tokenizer import PointTokenizer, from_imagenet, point, to_imagenet
from repae_jax.models.vit import RMS, SWIGLU, VisionTransformer, ViTBlock, rotate_patches

_THETA = 100.0  # base of the periods of rotary positions
_RMS_EPSILON, _DECODER_EPSILON = 1e-5, 1e-6


def rounded_rotation(rows: int, columns: int, head_dim: int) -> Float[np.ndarray, "N d/2"]:
    """Returns the angles of `vit.axial_rotation` as the published code has them: in bfloat16, every operation rounded to it."""
    half = jnp.bfloat16
    exponents = (2 * np.arange(head_dim // 4)).astype(half) / np.asarray(head_dim // 2, half)
    periods = np.power(_THETA, exponents.astype(np.float32)).astype(half)
    centers = [(np.arange(count) + 0.5).astype(half) / np.asarray(count, half) for count in (rows, columns)]
    positions = np.stack(np.meshgrid(*centers, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    positions = np.asarray(2, half) * positions - np.asarray(1, half)
    scaled = (np.float32(2 * math.pi) * positions.astype(np.float32)).astype(half)
    return (scaled / periods).reshape(-1, head_dim // 2)


def swiglu_width(hidden_size: int) -> int:
    """Returns the width of a SwiGLU in place of an MLP four times as wide: two thirds of that, a multiple of 8."""
    return -(-(4 * hidden_size * 2 // 3) // 8) * 8


class Encoder(nn.Module):
    """Maps normalized pixels to latents: the patch tokens of a vision transformer, through a linear bottleneck."""

    patch_size: int
    latent_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        rows, columns = (side // self.patch_size for side in pixels.shape[1:3])
        vit = VisionTransformer(
            patch_size=self.patch_size, hidden_size=self.hidden_size, depth=self.depth, num_heads=self.num_heads,
            mlp_dim=swiglu_width(self.hidden_size), grid=(rows, columns), activation=SWIGLU, rope_theta=_THETA,
            layer_scale=False, norm=RMS, norm_eps=_RMS_EPSILON, dtype=self.dtype, name="vit",
        )  # fmt: skip
        _, tokens = vit(pixels, angles=rounded_rotation(rows, columns, self.hidden_size // self.num_heads))
        latents = layers.Dense(self.latent_channels, use_bias=False, dtype=self.dtype, name="bottleneck")(tokens)
        return latents.astype(jnp.float32).reshape(-1, rows, columns, self.latent_channels)


class Decoder(nn.Module):
    """Maps latents to pixels: blocks between two linear layers, with rotary positions and no class token."""

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    remat: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        batch, rows, columns, channels = latents.shape
        flat = latents.reshape(batch, rows * columns, channels)
        x = layers.Dense(self.hidden_size, dtype=self.dtype, name="embed")(flat).astype(jnp.float32)
        rotate = functools.partial(rotate_patches, rounded_rotation(rows, columns, self.hidden_size // self.num_heads))
        x, _ = layers.scan_blocks(
            ViTBlock, self.depth, name="blocks", remat="full" if self.remat else "none", num_heads=self.num_heads,
            mlp_dim=swiglu_width(self.hidden_size), activation=SWIGLU, layer_scale=False, no_bias=(), rotate=rotate,
            norm_eps=_DECODER_EPSILON, attention="xla", dtype=self.dtype,
        )(x)  # fmt: skip
        x = nn.LayerNorm(_DECODER_EPSILON, dtype=jnp.float32, name="norm")(x)
        pixels = layers.Dense(3 * self.patch_size**2, dtype=self.dtype, name="to_pixels")(x)
        return layers.unpatchify(pixels.astype(jnp.float32), self.patch_size, rows)


class VisualTokenizer(PointTokenizer):
    """VTP's encoder and decoder, for images of any size that patch_size divides.

    Parameters are float32; `dtype` is the compute dtype of matrix products. Positions are rotated in bfloat16, as published.
    """

    latent_channels: int = 64  # width of the bottleneck
    patch_size: int = 16  # image pixels per latent along a side
    encoder_hidden_size: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_hidden_size: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    remat: bool = False  # recompute the decoder's blocks in the backward pass
    dtype: DTypeLike = jnp.float32

    def setup(self):
        shared = {"patch_size": self.patch_size, "dtype": self.dtype}
        self.encoder = Encoder(
            latent_channels=self.latent_channels, hidden_size=self.encoder_hidden_size, depth=self.encoder_depth,
            num_heads=self.encoder_heads, **shared,
        )  # fmt: skip
        self.decoder = Decoder(
            hidden_size=self.decoder_hidden_size, depth=self.decoder_depth, num_heads=self.decoder_heads, remat=self.remat,
            **shared,
        )  # fmt: skip

    def encode(self, images: Float[Array, "B H W 3"]) -> DiagonalGaussian:
        """Returns the latents of images in [-1, 1], as a posterior of standard deviation 0."""
        return point(self.encoder(to_imagenet(images)))

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Returns the float32 images of un-normalized latents, about [-1, 1], not clipped."""
        return from_imagenet(self.decoder(latents))
