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
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from repae_jax.models import layers

SWIGLU = "swiglu"
_ELEMENTWISE: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
RMS = "rms"
NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, RMS: nn.RMSNorm}
ACTIVATIONS = (*_ELEMENTWISE, SWIGLU)
PROJECTIONS = ("patch_embed", "query", "key", "value", "out")  # layers that may lack a bias


class SwiGLU(nn.Module):
    """Gated MLP, fc2(silu(gate(x)) * fc1(x))."""

    hidden_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, value = (layers.Dense(self.hidden_dim, dtype=self.dtype, name=name)(x) for name in ("gate", "fc1"))
        return layers.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(nn.silu(gate) * value)


class LayerScale(nn.Module):
    """Learned per-channel factor of a residual branch."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],))


def axial_rotation(rows: int, columns: int, head_dim: int, theta: float) -> Float[np.ndarray, "N d/2"]:
    """Returns the angles of DINOv3's rotary positions, float32.

    They are a patch center's row and column, each in [-1, 1], times head_dim / 4 frequencies, 2 pi / theta ** (4 f / head_dim);
    the rows' angles come first, and channels i and i + head_dim / 2 form one plane. ValueError if 4 does not divide head_dim.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need attention heads of a width divisible by 4, got {head_dim}")
    frequencies = 2 * math.pi / theta ** (np.arange(head_dim // 4) / (head_dim // 4))
    centers = [2 * (np.arange(count) + 0.5) / count - 1 for count in (rows, columns)]
    positions = np.stack(np.meshgrid(*centers, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    return (positions * frequencies).reshape(-1, head_dim // 2).astype(np.float32)


def rotate_patches(angles: Float[np.ndarray, "N d/2"], x: Float[Array, "B P+N heads d"]) -> Float[Array, "B P+N heads d"]:
    """Rotates the channel pairs (i, i + d/2) of the patch tokens by angles, in their dtype; the P tokens before stay."""
    prefix, patches = jnp.split(x, [x.shape[1] - len(angles)], axis=1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(patches.astype(angles.dtype), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([prefix, rotated.astype(x.dtype)], axis=1)


class ViTBlock(nn.Module):
    """Pre-norm transformer block; returns (x, None), as `nn.scan` takes it. The attributes are VisionTransformer's."""

    num_heads: int
    mlp_dim: int
    activation: str
    layer_scale: bool
    no_bias: Sequence[str]
    rotate: Callable | None
    norm_eps: float
    attention: layers.Implementation
    dtype: DTypeLike
    norm: str = "layer"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        norm = functools.partial(NORMS[self.norm], epsilon=self.norm_eps, dtype=jnp.float32)
        attention = layers.Attention(
            self.num_heads, no_bias=self.no_bias, rotate=self.rotate, implementation=self.attention, dtype=self.dtype,
            name="attn",
        )  # fmt: skip
        if self.activation == SWIGLU:
            mlp: Callable[[Array], Array] = SwiGLU(self.mlp_dim, dtype=self.dtype, name="mlp")
        else:
            mlp = layers.Mlp(self.mlp_dim, _ELEMENTWISE[self.activation], dtype=self.dtype, name="mlp")

        def scaled(name, branch):
            return LayerScale(name=name)(branch) if self.layer_scale else branch

        x = x + scaled("layer_scale1", attention(norm(name="norm1")(x)))
        x = x + scaled("layer_scale2", mlp(norm(name="norm2")(x)))
        return x, None


class VisionTransformer(nn.Module):
    """Vision transformer; the defaults are DINOv2's. Tokens are class tokens, registers, patches, in this order."""

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_dim: int
    grid: Sequence[int]  # rows and columns of patches
    activation: str = "gelu"  # activation of the MLPs, one of ACTIVATIONS; 'gelu' is the exact one
    num_class_tokens: int = 1  # or 0
    num_registers: int = 0  # tokens without positions
    rope_theta: float | None = None  # base of the periods of rotary positions; None is a learned table
    layer_scale: bool = True  # a learned factor per channel of each residual branch
    pre_norm: bool = False  # before the first block
    final_norm: bool = True  # after the last block
    no_bias: Sequence[str] = ()  # the PROJECTIONS without a bias
    norm: str = "layer"  # kind of all norms, one of NORMS
    norm_eps: float = 1e-6
    attention: layers.Implementation = "xla"
    dtype: DTypeLike = jnp.float32  # compute dtype of matrix products; parameters, residual stream and norms are float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W 3"], positions: Float[Array, "1 P+T D"] | None = None,
        angles: Float[np.ndarray, "T d/2"] | None = None,
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B T D"]]:
        """Returns float32 class tokens and patch tokens (rows first), after the final layer norm if there is one.

        The images are normalized as in the encoder's training; ValueError unless they have grid * patch_size pixels.
        `positions` or `angles`, if given, take the place of the module's own table or rotation.
        """
        rows, columns = self.grid
        expected = (rows * self.patch_size, columns * self.patch_size)
        if images.shape[1:3] != expected:
            raise ValueError(f"encoder expects images of {expected} pixels (grid {tuple(self.grid)}), got {images.shape[1:3]}")
        normal = nn.initializers.normal(0.02)
        norm = functools.partial(NORMS[self.norm], epsilon=self.norm_eps, dtype=jnp.float32)
        patches = layers.patchify(images.astype(self.dtype), self.patch_size)
        has_bias = "patch_embed" not in self.no_bias
        patches = layers.Dense(self.hidden_size, has_bias, dtype=self.dtype, name="patch_embed")(patches).astype(jnp.float32)

        def tokens(name, count):
            if not count:
                return jnp.zeros((patches.shape[0], 0, self.hidden_size))
            param = self.param(name, normal, (1, count, self.hidden_size))
            return jnp.broadcast_to(param, (patches.shape[0], count, self.hidden_size))

        x, rotate = jnp.concatenate([tokens("cls_token", self.num_class_tokens), patches], axis=1), None
        if positions is not None:
            x += positions
        elif self.rope_theta is None:
            x += self.param("pos_embed", normal, (1, x.shape[1], self.hidden_size))
        else:
            if angles is None:
                angles = axial_rotation(rows, columns, self.hidden_size // self.num_heads, self.rope_theta)
            rotate = functools.partial(rotate_patches, angles)
        cls, patches = jnp.split(x, [self.num_class_tokens], axis=1)
        x = jnp.concatenate([cls, tokens("register_tokens", self.num_registers), patches], axis=1)
        if self.pre_norm:
            x = norm(name="pre_norm")(x)
        shared = ("num_heads", "mlp_dim", "activation", "layer_scale", "no_bias", "norm", "norm_eps", "attention", "dtype")
        fields = {name: getattr(self, name) for name in shared}
        x, _ = layers.scan_blocks(ViTBlock, self.depth, name="blocks", rotate=rotate, **fields)(x)
        if self.final_norm:
            x = norm(name="norm")(x)
        return x[:, : self.num_class_tokens], x[:, self.num_class_tokens + self.num_registers :]
