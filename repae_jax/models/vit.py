"""One vision transformer for the frozen encoders.

Reference: DINOv2 (arXiv 2304.07193), with registers (2309.16588); `transformers`' Dinov2Model is the parity reference.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from repae_jax.models import layers

gelu_erf = functools.partial(jax.nn.gelu, approximate=False)


def swiglu_dim(hidden_size, mlp_ratio):
    """Hidden width of DINOv2's SwiGLU: two thirds of the MLP's, rounded up to a multiple of 8."""
    return (int(int(hidden_size * mlp_ratio) * 2 / 3) + 7) // 8 * 8


class SwiGLU(nn.Module):
    """Gated MLP, silu(a) * b with [a, b] = fc1(x): [B, T, D] -> [B, T, D]."""

    hidden_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        gate, value = jnp.split(nn.Dense(2 * self.hidden_dim, dtype=self.dtype, name="fc1")(x), 2, axis=-1)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(nn.silu(gate) * value)


class LayerScale(nn.Module):
    """Learned per-channel factor of a residual branch."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],))


class ViTBlock(nn.Module):
    """Pre-norm transformer block with LayerScale. Call: x [B, T, D] -> (x, None)."""

    num_heads: int
    mlp_ratio: float
    swiglu: bool
    norm_eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        norm = functools.partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=jnp.float32)
        if self.swiglu:
            mlp = SwiGLU(swiglu_dim(width, self.mlp_ratio), dtype=self.dtype, name="mlp")
        else:
            mlp = layers.Mlp(int(width * self.mlp_ratio), gelu_erf, dtype=self.dtype, name="mlp")
        attention = layers.Attention(self.num_heads, dtype=self.dtype, name="attn")
        x = x + LayerScale(name="layer_scale1")(attention(norm(name="norm1")(x)))
        x = x + LayerScale(name="layer_scale2")(mlp(norm(name="norm2")(x)))
        return x, None


class VisionTransformer(nn.Module):
    """DINOv2's architecture.

    Attributes:
      patch_size: pixels per token side.
      hidden_size: D, the feature width.
      depth: blocks.
      num_heads: attention heads.
      grid: rows and columns of the position embedding; images must be grid * patch_size pixels.
      mlp_ratio: MLP width / D.
      swiglu: gated MLP (DINOv2-giant) instead of GELU.
      num_registers: register tokens.
      norm_eps: layer-norm epsilon.
      dtype: compute dtype of matrix products; parameters, residual stream and norms are float32.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    grid: Sequence[int]
    mlp_ratio: float = 4.0
    swiglu: bool = False
    num_registers: int = 0
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        """Features of pre-processed images.

        Args:
          images: [B, grid[0] * patch_size, grid[1] * patch_size, 3], normalised as the encoder's training did.

        Returns:
          float32 tokens after the final layer norm: cls [B, D], patches [B, grid[0] * grid[1], D] (rows first).

        Raises:
          ValueError: if the images do not fill the grid.
        """
        rows, columns = self.grid
        expected = (rows * self.patch_size, columns * self.patch_size)
        if images.shape[1:3] != expected:
            raise ValueError(f"encoder expects images of {expected} pixels (grid {tuple(self.grid)}), got {images.shape[1:3]}")
        normal = nn.initializers.normal(0.02)
        x = layers.patchify(images.astype(self.dtype), self.patch_size)
        x = nn.Dense(self.hidden_size, dtype=self.dtype, name="patch_embed")(x)

        def tokens(name, count):
            param = self.param(name, normal, (1, count, self.hidden_size))
            return jnp.broadcast_to(param, (x.shape[0], count, self.hidden_size))

        positions = self.param("pos_embed", normal, (1, 1 + rows * columns, self.hidden_size))
        x = jnp.concatenate([tokens("cls_token", 1), x], axis=1) + positions
        if self.num_registers:  # after the cls token, without positions
            x = jnp.concatenate([x[:, :1], tokens("register_tokens", self.num_registers), x[:, 1:]], axis=1)
        block = layers.scan_blocks(
            ViTBlock, self.depth, name="blocks", num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio, swiglu=self.swiglu, norm_eps=self.norm_eps, dtype=self.dtype,
        )  # fmt: skip
        x, _ = block(x)
        x = nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.float32, name="norm")(x)
        return x[:, 0], x[:, 1 + self.num_registers :]
