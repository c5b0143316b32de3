"""One vision transformer for all frozen encoders.

References: DINOv2 (arXiv 2304.07193), with registers (2309.16588), DINO (2104.14294), MoCo v3 (2104.02057), MAE (2111.06377),
I-JEPA (2301.08243), CLIP (2103.00020), SigLIP 2 (2502.14786), DINOv3 (2508.10104). `transformers`' modules are the parity
references.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repae_jax.models import layers

SWIGLU = "swiglu"
_ELEMENTWISE = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
ACTIVATIONS = (*_ELEMENTWISE, SWIGLU)
PROJECTIONS = ("patch_embed", "query", "key", "value", "out")  # which may lack a bias


class SwiGLU(nn.Module):
    """Gated MLP, fc2(silu(gate(x)) * fc1(x)): [B, T, D] -> [B, T, D]."""

    hidden_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        gate, value = (layers.Dense(self.hidden_dim, dtype=self.dtype, name=name)(x) for name in ("gate", "fc1"))
        return layers.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(nn.silu(gate) * value)


class LayerScale(nn.Module):
    """Learned per-channel factor of a residual branch."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],))


def axial_rotation(rows, columns, head_dim, theta):
    """Angles of DINOv3's rotary positions: of a patch centre's row and column, each in [-1, 1], in head_dim / 4 frequencies.

    Args:
      rows: of the token grid.
      columns: of the token grid.
      head_dim: channels of an attention head, divisible by 4.
      theta: frequency f is 2 pi / theta ** (4 f / head_dim).

    Returns:
      float32 numpy [rows * columns, head_dim / 2], rows' angles first; channel i and i + head_dim / 2 are one plane.

    Raises:
      ValueError: if head_dim is not divisible by 4.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need attention heads of a width divisible by 4, got {head_dim}")
    frequencies = 2 * math.pi / theta ** (np.arange(head_dim // 4) / (head_dim // 4))
    centres = [2 * (np.arange(count) + 0.5) / count - 1 for count in (rows, columns)]
    positions = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    return (positions * frequencies).reshape(-1, head_dim // 2).astype(np.float32)


def rotate_patches(angles, x):
    """Rotates the patch tokens' channel pairs (i, i + d/2) by their angles; the tokens before them are left alone.

    Args:
      angles: [N, d / 2].
      x: [B, P + N, heads, d].

    Returns:
      [B, P + N, heads, d] of x's dtype, computed in float32.
    """
    prefix, patches = jnp.split(x, [x.shape[1] - len(angles)], axis=1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(patches.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([prefix, rotated.astype(x.dtype)], axis=1)


class ViTBlock(nn.Module):
    """Pre-norm transformer block. Call: x [B, T, D] -> (x, None). Attributes as VisionTransformer's."""

    num_heads: int
    mlp_dim: int
    activation: str
    layer_scale: bool
    unbiased: Sequence[str]
    rotate: Callable | None
    norm_eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=jnp.float32)
        attention = layers.Attention(self.num_heads, unbiased=self.unbiased, rotate=self.rotate, dtype=self.dtype, name="attn")
        if self.activation == SWIGLU:
            mlp = SwiGLU(self.mlp_dim, dtype=self.dtype, name="mlp")
        else:
            mlp = layers.Mlp(self.mlp_dim, _ELEMENTWISE[self.activation], dtype=self.dtype, name="mlp")

        def scaled(name, branch):
            return LayerScale(name=name)(branch) if self.layer_scale else branch

        x = x + scaled("layer_scale1", attention(norm(name="norm1")(x)))
        x = x + scaled("layer_scale2", mlp(norm(name="norm2")(x)))
        return x, None


class VisionTransformer(nn.Module):
    """A vision transformer; the defaults are DINOv2's. Tokens are class tokens, registers, patches, in this order.

    Attributes:
      patch_size: pixels per token side.
      hidden_size: D, the feature width.
      depth: blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLPs.
      grid: rows and columns of patches; images must be grid * patch_size pixels.
      activation: of the MLPs, one of ACTIVATIONS; 'gelu' is the exact one.
      num_class_tokens: 1, or 0 for encoders without one.
      num_registers: further tokens, without positions.
      rope_theta: base of the periods of rotary positions, which take the place of the learned table; None is the table.
      layer_scale: whether each residual branch has a learned factor per channel.
      pre_norm: whether a layer norm stands before the first block.
      final_norm: whether one stands behind the last.
      unbiased: those of PROJECTIONS that have no bias.
      norm_eps: layer-norm epsilon.
      dtype: compute dtype of matrix products; parameters, residual stream and norms are float32.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_dim: int
    grid: Sequence[int]
    activation: str = "gelu"
    num_class_tokens: int = 1
    num_registers: int = 0
    rope_theta: float | None = None
    layer_scale: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    unbiased: Sequence[str] = ()
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        """Features of pre-processed images.

        Args:
          images: [B, grid[0] * patch_size, grid[1] * patch_size, 3], normalised as the encoder's training did.

        Returns:
          float32 tokens after the final layer norm, or after the last block where there is none:
          class tokens [B, num_class_tokens, D], patches [B, grid[0] * grid[1], D] (rows first).

        Raises:
          ValueError: if the images do not fill the grid.
        """
        rows, columns = self.grid
        expected = (rows * self.patch_size, columns * self.patch_size)
        if images.shape[1:3] != expected:
            raise ValueError(f"encoder expects images of {expected} pixels (grid {tuple(self.grid)}), got {images.shape[1:3]}")
        normal = nn.initializers.normal(0.02)
        norm = functools.partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=jnp.float32)
        patches = layers.patchify(images.astype(self.dtype), self.patch_size)
        has_bias = "patch_embed" not in self.unbiased
        patches = layers.Dense(self.hidden_size, has_bias, dtype=self.dtype, name="patch_embed")(patches).astype(jnp.float32)

        def tokens(name, count):
            if not count:  # nor a parameter
                return jnp.zeros((patches.shape[0], 0, self.hidden_size))
            param = self.param(name, normal, (1, count, self.hidden_size))
            return jnp.broadcast_to(param, (patches.shape[0], count, self.hidden_size))

        x, rotate = jnp.concatenate([tokens("cls_token", self.num_class_tokens), patches], axis=1), None
        if self.rope_theta is None:
            x += self.param("pos_embed", normal, (1, x.shape[1], self.hidden_size))
        else:
            angles = axial_rotation(rows, columns, self.hidden_size // self.num_heads, self.rope_theta)
            rotate = functools.partial(rotate_patches, angles)
        cls, patches = jnp.split(x, [self.num_class_tokens], axis=1)
        x = jnp.concatenate([cls, tokens("register_tokens", self.num_registers), patches], axis=1)
        if self.pre_norm:
            x = norm(name="pre_norm")(x)
        block = layers.scan_blocks(
            ViTBlock, self.depth, name="blocks", num_heads=self.num_heads, mlp_dim=self.mlp_dim, activation=self.activation,
            layer_scale=self.layer_scale, unbiased=self.unbiased, rotate=rotate, norm_eps=self.norm_eps, dtype=self.dtype,
        )  # fmt: skip
        x, _ = block(x)
        if self.final_norm:
            x = norm(name="norm")(x)
        return x[:, : self.num_class_tokens], x[:, self.num_class_tokens + self.num_registers :]
