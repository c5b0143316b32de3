"""Feature spaces in which generated images are compared with real ones, beside Inception's: one vector per image.

A space is one entry of SPACES: how images are prepared, which network, which of its outputs. All are as in the code that
published numbers come from, where that differs from the encoders that targets are made with (`models.encoders`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from repae_jax.models import layers
from repae_jax.models.convnext import ConvNextV2
from repae_jax.models.encoders import FAMILIES, IMAGENET_MEAN, IMAGENET_STD, resample_positions
from repae_jax.models.vit import VisionTransformer


class AttentionPool(nn.Module):
    """SigLIP's head: a learned query attends to all tokens, and an MLP follows; one vector per image."""

    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        count, _, width = tokens.shape
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, width))

        def heads(name, x):
            return layers.Dense(width, name=name)(x).reshape(*x.shape[:2], self.num_heads, width // self.num_heads)

        query = heads("query", jnp.broadcast_to(probe, (count, 1, width)))
        y = jax.nn.dot_product_attention(query, heads("key", tokens), heads("value", tokens)).reshape(count, 1, width)
        x = layers.Dense(width, name="out")(y)
        mlp = layers.Mlp(self.mlp_dim, lambda y: jax.nn.gelu(y, approximate=True), name="mlp")
        return (x + mlp(nn.LayerNorm(epsilon=1e-6, name="norm")(x)))[:, 0]


class ImageFeatures(nn.Module):
    """The class token of a vision transformer, or its attention pool where it has none; both after the last layer norm."""

    vit: VisionTransformer
    projection: int | None = None  # width of CLIP's space of images and texts, in which vectors have length 1

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
        tokens, patches = self.vit(images)
        if self.vit.num_class_tokens:
            x = tokens[:, 0]
        else:
            x = AttentionPool(self.vit.num_heads, self.vit.mlp_dim, name="pool")(patches)
        if self.projection is None:
            return x
        x = nn.Dense(self.projection, use_bias=False, name="projection")(x)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def resize_pil(images: UInt8[Array, "B H W C"], size: int) -> Float[Array, "B size size C"]:
    """Resizes as Pillow's BICUBIC on 8-bit images: columns first, with antialiasing, rounded after either axis; in 0..255.

    Pillow 13 begins with the rows of some images that are not square, which shifts some pixels by a few gray levels.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        if x.shape[axis] != size:
            shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
            x = jnp.floor(jax.image.resize(x, shape, "cubic", antialias=True) + 0.5).clip(0, 255)
    return x


def resize_antialiased(images: UInt8[Array, "B H W C"], size: int) -> Float[Array, "B size size C"]:
    """Resizes as torch's interpolate(mode='bicubic', antialias=True), without clipping; about 0..255."""
    x = images.astype(jnp.float32)
    if x.shape[1:3] == (size, size):
        return x
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "cubic", antialias=True)


def resample_as_dinov2(pos_embed: Float[Array, "1 P+N D"], grid: int, num_prefix: int = 1) -> Float[np.ndarray, "1 P+T D"]:
    """Resamples positions as DINOv2's own code: bicubic (a = -0.75) without antialiasing, a tenth of a patch too wide.

    Reference: dinov2 `vision_transformer.py` `interpolate_pos_encoding`, with interpolate_offset = 0.1.
    """
    table = np.asarray(pos_embed, np.float64)
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    old, width = math.isqrt(patches.shape[1]), patches.shape[2]
    if old == grid:
        return np.asarray(pos_embed, np.float32)
    weights = np.zeros((grid, old))
    centers = (np.arange(grid) + 0.5) * old / (grid + 0.1) - 0.5
    for row, center in enumerate(centers):
        for at in range(math.floor(center) - 1, math.floor(center) + 3):
            weights[row, min(max(at, 0), old - 1)] += _cubic(abs(center - at))  # the edges are repeated
    resampled = np.einsum("ri,cj,ijd->rcd", weights, weights, patches.reshape(old, old, width))
    return np.concatenate([prefix, resampled.reshape(1, grid**2, width)], axis=1).astype(np.float32)


def _cubic(x: float, a: float = -0.75) -> float:
    """Computes Keys' cubic kernel at a distance below 2."""
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """A feature space."""

    weights: str  # name on the hub of what it is published with
    module: ImageFeatures | ConvNextV2
    size: int  # features
    pixels: int  # side that images are resized to; zeros fill the right and lower edge up to whole patches
    protocol: str  # in words: token, norm, preparation
    resize: Callable[[UInt8[Array, "B H W 3"], int], Float[Array, "B S S 3"]] = resize_antialiased
    positions: Callable[..., Any] = resample_positions
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    divisor: float | None = None  # distance of ImageNet's validation images, in FDr6

    @property
    def side(self) -> int:
        """Pixels that the network receives, a multiple of its patches."""
        if not isinstance(self.module, ImageFeatures):
            return self.pixels
        patch = self.module.vit.patch_size
        return -(-self.pixels // patch) * patch


def prepare(space: Space, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B S S 3"]:
    """Returns (images / 255 - mean) / std in float32, resized to a square and filled up with zeros, as the space wants them."""
    x = space.resize(images, space.pixels) / 255
    x = (x - np.asarray(space.mean, np.float32)) / np.asarray(space.std, np.float32)
    missing = space.side - space.pixels
    return jnp.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0)))


def image_features(space: Space, params: Any, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B F"]:
    """Returns the features of images, float32."""
    return jnp.asarray(space.module.apply({"params": params}, prepare(space, images)), jnp.float32)


def _vit(patch, pixels, width, depth, heads, projection=None, **fields):
    side = -(-pixels // patch)
    sizes = {"mlp_dim": 4 * width, "layer_scale": False, **fields}
    vit = VisionTransformer(patch, width, depth, heads, grid=(side, side), **sizes)
    return ImageFeatures(vit, projection)


_CLIP: dict[str, Any] = {name: getattr(FAMILIES["clip"], name) for name in ("mean", "std")}
_CLIP_VIT: dict[str, Any] = {"no_bias": ("patch_embed",), "pre_norm": True, "norm_eps": 1e-5}
_HALF: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
INCEPTION_DIVISOR = 1.68  # of FDr6; the other five are the spaces'

# `dinov2`: dgm-eval `models/dinov2.py` (arXiv 2306.04675); `clip_336`: google-research `cmmd/embedding.py`, of images that its
# `io_util.py` resizes by Pillow (arXiv 2401.09603); the others: FD-loss `frechet_distance/repr_models.py` and `eval_all_fds.py`
# (arXiv 2604.28190), of timm's modules, which have GELU in CLIP, whose weights were trained with QuickGELU. Published numbers
# of the latter were computed in bfloat16.
SPACES = {
    "dinov2": Space(
        "facebook/dinov2-large", _vit(14, 224, 1024, 24, 16, layer_scale=True), 1024, 224,
        "DINOv2 ViT-L/14, class token after the norm; 224 px by Pillow's bicubic; positions as in DINOv2's code",
        resize=resize_pil, positions=resample_as_dinov2,
    ),
    "clip_336": Space(
        "openai/clip-vit-large-patch14-336", _vit(14, 336, 1024, 24, 16, 768, activation="quick_gelu", **_CLIP_VIT), 768, 336,
        "CLIP ViT-L/14, projected, of length 1; 336 px by Pillow's bicubic", resize=resize_pil, **_CLIP,
    ),
    "convnext": Space(
        "timm/convnextv2_base.fcmae_ft_in22k_in1k", ConvNextV2((3, 3, 27, 3), (128, 256, 512, 1024)), 1024, 224,
        "ConvNeXt V2 B (FCMAE, ImageNet-22k, -1k), mean over positions before the norm; 224 px by bicubic, antialiased",
        divisor=56.87,
    ),
    "dinov2_256": Space(
        "timm/vit_large_patch14_dinov2.lvd142m", _vit(14, 256, 1024, 24, 16, layer_scale=True), 1024, 256,
        "DINOv2 ViT-L/14, class token after the norm; 256 px by bicubic, antialiased, zeros up to 266 px", divisor=14.19,
    ),
    "mae": Space(
        "timm/vit_large_patch16_224.mae", _vit(16, 224, 1024, 24, 16), 1024, 224,
        "MAE ViT-L/16, class token after the norm; 224 px by bicubic, antialiased", divisor=0.04,
    ),
    "siglip2": Space(
        "timm/vit_so400m_patch16_siglip_256.v2_webli",
        _vit(16, 224, 1152, 27, 16, mlp_dim=4304, activation="gelu_tanh", num_class_tokens=0), 1152, 224,
        "SigLIP 2 SO400M/16, attention pool; 224 px by bicubic, antialiased", divisor=0.60, **_HALF,
    ),
    "clip_256": Space(
        "timm/vit_large_patch14_clip_224.openai", _vit(14, 256, 1024, 24, 16, **_CLIP_VIT), 1024, 256,
        "CLIP ViT-L/14 with GELU, class token after the norm; 256 px by bicubic, antialiased, zeros up to 266 px", divisor=5.60,
        **_CLIP,
    ),
}  # fmt: skip
FDR6 = tuple(name for name, space in SPACES.items() if space.divisor is not None)  # with Inception's, the six
