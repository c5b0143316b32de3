"""Images -> target tokens of the frozen encoders: which networks there are, their preprocessing, their features."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from repae_jax.models.vit import VisionTransformer

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DINOV2 = {
    "dinov2-small": {"patch_size": 14, "hidden_size": 384, "depth": 12, "num_heads": 6},
    "dinov2-base": {"patch_size": 14, "hidden_size": 768, "depth": 12, "num_heads": 12},
    "dinov2-large": {"patch_size": 14, "hidden_size": 1024, "depth": 24, "num_heads": 16},
    "dinov2-giant": {"patch_size": 14, "hidden_size": 1536, "depth": 40, "num_heads": 24, "swiglu": True},
}
# name -> fields of VisionTransformer
ARCHITECTURES = {
    **_DINOV2,
    **{f"{name}-with-registers": {**fields, "num_registers": 4} for name, fields in _DINOV2.items()},
}
_REQUIRED = ("patch_size", "hidden_size", "depth", "num_heads")
_OPTIONAL = ("mlp_ratio", "swiglu", "num_registers", "norm_eps")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen vision transformer and what its images must look like; the parameters are kept apart.

    Attributes:
      name: for messages and logs.
      module: the network.
      image_size: height and width in pixels that the network receives.
      mean: per-channel mean of the normalisation, for pixels in [0, 1].
      std: per-channel standard deviation, likewise.
    """

    name: str
    module: VisionTransformer
    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def grid(self):
        """Tokens per side; T = grid ** 2."""
        return self.image_size // self.module.patch_size


def make_encoder(architecture, resolution, *, image_size=None, dtype=jnp.float32):
    """Encoder for training images of one resolution.

    Args:
      architecture: a name in ARCHITECTURES, or a mapping of VisionTransformer's patch_size, hidden_size, depth,
        num_heads and optionally mlp_ratio, swiglu, num_registers, norm_eps.
      resolution: height and width of the training images in pixels.
      image_size: pixels that the network receives; by default 224 * resolution // 256, as published.
      dtype: compute dtype.

    Returns:
      Encoder.

    Raises:
      ValueError: for an unknown architecture or field, a field that is missing, or sizes that do not divide.

    Reference: REPA-E `train_repae.py` `preprocess_raw_image`.
    """
    name, fields = _architecture(architecture)
    if image_size is None:
        image_size = 224 * resolution // 256
    patch_size = fields["patch_size"]
    if image_size < patch_size or image_size % patch_size:
        below = image_size // patch_size * patch_size
        allowed = " or ".join(str(size) for size in (below, below + patch_size) if size)
        raise ValueError(
            f"encoder {name!r}: image_size {image_size} (resolution {resolution}) is not a multiple of its patch size "
            f"{patch_size}; set the encoder's image_size to e.g. {allowed}, or use another patch_size"
        )
    grid = image_size // patch_size
    return Encoder(name, VisionTransformer(grid=(grid, grid), dtype=dtype, **fields), image_size)


def _architecture(architecture):
    if isinstance(architecture, str):
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"encoder architecture {architecture!r} is unknown; allowed: {', '.join(ARCHITECTURES)}, "
                f"or a mapping with {', '.join(_REQUIRED)}"
            )
        return architecture, ARCHITECTURES[architecture]
    fields = dict(architecture)
    unknown = sorted(set(fields) - {*_REQUIRED, *_OPTIONAL})
    missing = [field for field in _REQUIRED if field not in fields]
    if unknown or missing:
        raise ValueError(
            f"encoder architecture has unknown fields {unknown} and lacks {missing}; "
            f"needed: {', '.join(_REQUIRED)}; optional: {', '.join(_OPTIONAL)}"
        )
    if fields["hidden_size"] % fields["num_heads"]:
        raise ValueError(
            f"encoder architecture: hidden_size {fields['hidden_size']} is not divisible by num_heads "
            f"{fields['num_heads']}; change one of them"
        )
    return f"vit-{fields['hidden_size']}x{fields['depth']}-patch{fields['patch_size']}", fields


def init_params(encoder, key):
    """Random parameters of an encoder; under `jax.eval_shape` their shapes alone.

    Args:
      encoder: Encoder.
      key: random key.

    Returns:
      The module's 'params', float32.
    """
    return encoder.module.init(key, jnp.zeros((1, encoder.image_size, encoder.image_size, 3)))["params"]


def preprocess(encoder, images):
    """What the encoder's network receives: normalised, then resized.

    Args:
      encoder: Encoder.
      images: uint8 [B, H, H, 3].

    Returns:
      float32 [B, S, S, 3], S the encoder's image_size; zero mean and unit variance over ImageNet.

    Raises:
      ValueError: if the images are not square uint8 RGB.

    Reference: REPA-E `train_repae.py` `preprocess_raw_image`.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(
            f"encoder {encoder.name!r} got {images.dtype} {list(images.shape)}; allowed: uint8 [B, H, H, 3] with "
            "values 0..255; pass the images before any normalisation"
        )
    x = images.astype(jnp.float32) / 255
    x = (x - np.asarray(encoder.mean, np.float32)) / np.asarray(encoder.std, np.float32)
    return resize_bicubic(x, encoder.image_size, encoder.image_size)


def resize_bicubic(images, height, width):
    """Bicubic resize as torch.nn.functional.interpolate(mode='bicubic', align_corners=False) does it.

    Args:
      images: float [B, H, W, C].
      height: rows of the result.
      width: columns of the result.

    Returns:
      [B, height, width, C] of the same dtype; `images` itself when the size agrees.
    """
    if images.shape[1:3] == (height, width):
        return images
    # torch's kernel has a = -0.75, repeats the edge pixels and does not antialias; plain 'bicubic' differs in all three
    shape = (images.shape[0], height, width, images.shape[3])
    return jax.image.resize(images, shape, method="bicubic-pytorch", antialias=False)


def encode(encoder, params, images):
    """Target tokens: patch tokens after the final layer norm, without cls and register tokens.

    Args:
      encoder: Encoder.
      params: its parameters.
      images: uint8 [B, H, H, 3].

    Returns:
      float32 [B, T, F], rows first, T = grid ** 2; no gradient flows through it.

    Raises:
      ValueError: if the images are not square uint8 RGB.
    """
    with jax.named_scope("encoder"):
        _, patches = encoder.module.apply({"params": params}, preprocess(encoder, images))
        return jax.lax.stop_gradient(patches)


def resample_positions(pos_embed, grid):
    """Position embedding for another grid: the cls token's is kept, the others are resampled.

    Args:
      pos_embed: [1, 1 + N, D], N a square number, rows first.
      grid: tokens per side of the result.

    Returns:
      float32 [1, 1 + grid ** 2, D].

    Raises:
      ValueError: if the shape is another one.

    Reference: timm `resample_abs_pos_embed` (bicubic, antialiased), called by REPA-E `utils.py` `load_encoders`.
    """
    pos_embed = jnp.asarray(pos_embed, jnp.float32)
    old = math.isqrt(max(pos_embed.shape[1] - 1, 0)) if pos_embed.ndim == 3 else 0
    if not old or pos_embed.shape[:2] != (1, 1 + old**2):
        raise ValueError(
            f"position embedding has shape {pos_embed.shape}; allowed: [1, 1 + N, D] with N a square number, "
            "the cls token's first"
        )
    if grid == old:
        return pos_embed
    prefix, patches = pos_embed[:, :1], pos_embed[:, 1:]
    width = pos_embed.shape[2]
    # antialiasing torch resizes with a = -0.5 and renormalised edges, as JAX's 'bicubic' does
    patches = jax.image.resize(patches.reshape(1, old, old, width), (1, grid, grid, width), "bicubic", antialias=True)
    return jnp.concatenate([prefix, patches.reshape(1, grid**2, width)], axis=1)


def check_grid(encoder, token_grid):
    """Raises unless the encoder's tokens and the SiT's lie on the same grid.

    Args:
      encoder: Encoder.
      token_grid: the SiT's tokens per side.

    Raises:
      ValueError: naming both grids and what can be changed.
    """
    if encoder.grid != token_grid:
        raise ValueError(
            f"encoder {encoder.name!r} gives {encoder.grid} x {encoder.grid} tokens ({encoder.image_size} pixels, "
            f"patches of {encoder.module.patch_size}), the SiT has {token_grid} x {token_grid}; set the encoder's "
            f"image_size to {token_grid * encoder.module.patch_size}, or change the SiT's patch_size or the VAE's "
            "downsampling factor"
        )
