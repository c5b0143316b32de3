"""Representation autoencoder: the patch tokens of a frozen DINOv2 are the latents, which a vision transformer decodes.

The latents are normalized inside, position by position, with statistics of the data; those that a diffusion model sees have
mean 0 and variance 1 without further ones.

Reference: RAE (arXiv 2510.11690), `stage1/rae.py` and `decoder.py` of bytetriper/RAE. diffusers' AutoencoderRAE is the parity
reference.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from repae_jax.models import layers
from repae_jax.models.autoencoder import DiagonalGaussian
from repae_jax.models.encoders import resample_positions, resize_bicubic
from repae_jax.models.point_tokenizer import PointTokenizer, from_imagenet, point, to_imagenet
from repae_jax.models.vit import VisionTransformer, ViTBlock

FROZEN = ("encoder", "encoder_positions", "latent_norm")  # the parts that no training changes
STD_EPSILON = 1e-5  # diffusers adds it to the standard deviation, the published code to the variance
_DECODER_EPSILON = 1e-12  # of layer norms, as in MAE


class LatentNorm(nn.Module):
    """Normalization of latents by the mean and the standard deviation of each position and channel."""

    shape: tuple[int, int, int]  # [h, w, C]

    def setup(self):
        self.mean = self.param("mean", nn.initializers.zeros, self.shape)
        self.std = self.param("std", nn.initializers.ones, self.shape)

    def normalize(self, tokens: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Returns (tokens - mean) / (std + 1e-5)."""
        return (tokens - self.mean) / (self.std + STD_EPSILON)

    def denormalize(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Inverse of `normalize`."""
        return latents * (self.std + STD_EPSILON) + self.mean


class Decoder(nn.Module):
    """Maps the encoder's tokens to pixels, as MAE's decoder: fixed sin-cos positions, a learned class token, a linear head.

    Positions are 0, 1, 2, … as in the published code; diffusers stretches them to 16, which is the same at 256 pixels alone.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_dim: int
    remat: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        batch, rows, columns, channels = tokens.shape
        flat = tokens.reshape(batch, rows * columns, channels)
        x = layers.Dense(self.hidden_size, dtype=self.dtype, name="embed")(flat).astype(jnp.float32)
        x += layers.sincos_position_embedding(self.hidden_size, rows, columns)
        cls = self.param("cls_token", nn.initializers.zeros, (1, 1, self.hidden_size))
        x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, self.hidden_size)), x], axis=1)
        x, _ = layers.scan_blocks(
            ViTBlock, self.depth, name="blocks", remat="full" if self.remat else "none", num_heads=self.num_heads,
            mlp_dim=self.mlp_dim, activation="gelu", layer_scale=False, no_bias=(), rotate=None, norm_eps=_DECODER_EPSILON,
            attention="xla", dtype=self.dtype,
        )(x)  # fmt: skip
        x = nn.LayerNorm(_DECODER_EPSILON, dtype=jnp.float32, name="norm")(x)
        pixels = layers.Dense(3 * self.patch_size**2, dtype=self.dtype, name="to_pixels")(x[:, 1:])
        return layers.unpatchify(pixels.astype(jnp.float32), self.patch_size, rows)


def encoder_of(rae: "RepresentationAutoencoder") -> VisionTransformer:
    """Returns the encoder's module, without the norm that follows it, and without positions."""
    return VisionTransformer(
        patch_size=rae.encoder_patch_size, hidden_size=rae.latent_channels, depth=rae.encoder_depth,
        num_heads=rae.encoder_heads, mlp_dim=4 * rae.latent_channels, grid=(rae.grid, rae.grid), num_registers=4,
        final_norm=False, dtype=rae.dtype,
    )  # fmt: skip


class RepresentationAutoencoder(PointTokenizer):
    """An RAE for images of one size: DINOv2 with registers, without the affine part of its last norm, and a ViT decoder.

    Parameters are float32; `dtype` is the compute dtype of matrix products. Without training, the statistics are 0 and 1.
    """

    latent_channels: int  # width of the encoder
    grid: int  # latents per side; images have grid * patch_size pixels, of which the encoder sees grid * encoder_patch_size
    patch_size: int = 16  # image pixels per latent along a side
    encoder_patch_size: int = 14
    encoder_depth: int = 12
    encoder_heads: int = 12
    encoder_table: int = 37  # side of the encoder's stored table of positions
    decoder_hidden_size: int = 1152
    decoder_depth: int = 28
    decoder_heads: int = 16
    decoder_mlp_dim: int = 4096
    remat: bool = False  # recompute the decoder's blocks in the backward pass
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.encoder = encoder_of(self)
        shape = (1, 1 + self.encoder_table**2, self.latent_channels)
        self.encoder_positions = self.param("encoder_positions", nn.initializers.normal(0.02), shape)
        self.encoder_norm = nn.LayerNorm(1e-6, use_scale=False, use_bias=False, dtype=jnp.float32)
        self.latent_norm = LatentNorm((self.grid, self.grid, self.latent_channels))
        self.decoder = Decoder(
            self.patch_size, self.decoder_hidden_size, self.decoder_depth, self.decoder_heads, self.decoder_mlp_dim,
            self.remat, self.dtype,
        )  # fmt: skip

    def encode(self, images: Float[Array, "B H W 3"]) -> DiagonalGaussian:
        """Returns the normalized tokens of images in [-1, 1], as a posterior of standard deviation 0.

        ValueError unless the images have grid * patch_size pixels per side.
        """
        side = self.grid * self.patch_size
        if images.shape[1:3] != (side, side):
            raise ValueError(f"images have {images.shape[1]} x {images.shape[2]} pixels; this RAE is for {side} x {side}")
        pixels = to_imagenet(images)
        seen = self.grid * self.encoder_patch_size
        _, tokens = self.encoder(resize_bicubic(pixels, seen, seen), resample_positions(self.encoder_positions, self.grid))
        grid = self.encoder_norm(tokens).reshape(-1, self.grid, self.grid, self.latent_channels)
        return point(self.latent_norm.normalize(grid))

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Returns the float32 images of normalized latents, about [-1, 1], not clipped."""
        return from_imagenet(self.decoder(self.latent_norm.denormalize(latents.astype(jnp.float32))))
