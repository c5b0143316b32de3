"""Images -> target tokens of the frozen encoders: which networks there are, their preprocessing, their features."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repae_jax.distributed.sharding import unsharded
from repae_jax.models.vit import ACTIVATIONS, PROJECTIONS, VisionTransformer
from repae_jax.ranges import OrNone, check, real, whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Family:
    """What encoders that were trained alike have in common.

    Attributes:
      fields: fields of VisionTransformer that differ from its defaults, DINOv2's.
      pixels: side that an image of 256 pixels is resized to; in proportion for other sizes.
      mean: per-channel mean of the normalisation, for pixels in [0, 1].
      std: per-channel standard deviation, likewise.
      spatial_gamma: share of the mean that iREPA's normalisation over the positions takes off; None is no normalisation.
    """

    fields: Mapping[str, Any]
    pixels: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


_PLAIN = {"layer_scale": False}
# Which tokens, pixels and statistics: REPA's and REPA-E's `preprocess_raw_image`, `load_encoders` and models/ for all but the
# last two. The norms' epsilons are those of the Hugging Face folders; the original DINO and MAE have 1e-6.
FAMILIES = {
    "dinov2": Family({}, pixels=224),  # x_norm_patchtokens, with registers too
    "dino": Family({**_PLAIN, "norm_eps": 1e-12}, pixels=256),
    "mocov3": Family(_PLAIN, pixels=256),  # RCG's checkpoints
    # after the last block, before the final norm: mae_vit.py and clip_vit.py leave it out
    "mae": Family({**_PLAIN, "final_norm": False, "norm_eps": 1e-12}, pixels=256),
    "clip": Family(
        {
            **_PLAIN, "activation": "quick_gelu", "unbiased": ("patch_embed",), "pre_norm": True, "final_norm": False,
            "norm_eps": 1e-5,
        },
        pixels=224, mean=CLIP_MEAN, std=CLIP_STD,
    ),
    "ijepa": Family({**_PLAIN, "num_class_tokens": 0}, pixels=224),
    # tokens and pixels: iREPA's `vision_encoder.py`; statistics: the models' preprocessor_config.json, where iREPA gives
    # SigLIP 2 ImageNet's
    "dinov3": Family({"num_registers": 4, "rope_theta": 100.0, "unbiased": ("key",), "norm_eps": 1e-5}, pixels=256),
    "siglip2": Family(
        {**_PLAIN, "activation": "gelu_tanh", "num_class_tokens": 0}, pixels=256, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
}  # fmt: skip


def _sized(family, patch_size, hidden_size, depth, num_heads, **fields):
    return {
        "family": family, "patch_size": patch_size, "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, **fields
    }  # fmt: skip


_DINOV2 = {
    "dinov2-small": _sized("dinov2", 14, 384, 12, 6),
    "dinov2-base": _sized("dinov2", 14, 768, 12, 12),
    "dinov2-large": _sized("dinov2", 14, 1024, 24, 16),
    "dinov2-giant": _sized("dinov2", 14, 1536, 40, 24, activation="swiglu", mlp_dim=4096),
}
# name -> architecture as make_encoder takes it
ARCHITECTURES = {
    **_DINOV2,
    **{f"{name}-with-registers": {**fields, "num_registers": 4} for name, fields in _DINOV2.items()},
    "dino-vitb16": _sized("dino", 16, 768, 12, 12),
    "mocov3-small": _sized("mocov3", 16, 384, 12, 12),
    "mocov3-base": _sized("mocov3", 16, 768, 12, 12),
    "mocov3-large": _sized("mocov3", 16, 1024, 24, 16),
    "vit-mae-large": _sized("mae", 16, 1024, 24, 16),
    "ijepa_vith14_1k": _sized("ijepa", 14, 1280, 32, 16),
    "clip-vit-large-patch14": _sized("clip", 14, 1024, 24, 16),
    "dinov3-vits16": _sized("dinov3", 16, 384, 12, 6),
    "dinov3-vitb16": _sized("dinov3", 16, 768, 12, 12),
    "dinov3-vitl16": _sized("dinov3", 16, 1024, 24, 16),
    "siglip2-base-patch16-256": _sized("siglip2", 16, 768, 12, 12),
    "siglip2-so400m-patch16-256": _sized("siglip2", 16, 1152, 27, 16, mlp_dim=4304),
}
_REQUIRED = ("patch_size", "hidden_size", "depth", "num_heads")
_OPTIONAL = ("family", "mlp_dim", "activation", "num_registers", "rope_theta", "unbiased", "norm_eps")

_SIZE = whole(1, 2**20)
_NUMBERS = {
    **dict.fromkeys((*_REQUIRED, "mlp_dim"), _SIZE), "num_registers": whole(0, 2**20), "rope_theta": OrNone(real(above=0)),
    "norm_eps": real(above=0),
}  # fmt: skip


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
    spatial_gamma: float | None = None

    @property
    def grid(self):
        """Tokens per side; T = grid ** 2."""
        return self.image_size // self.module.patch_size


def make_encoder(architecture, resolution, *, image_size=None, dtype=jnp.float32):
    """Encoder for training images of one resolution.

    Args:
      architecture: a name in ARCHITECTURES, or a mapping of VisionTransformer's patch_size, hidden_size, depth, num_heads
        and optionally mlp_dim (default 4 * hidden_size), activation, num_registers, rope_theta, unbiased, norm_eps, whose
        defaults depend on its `family`, one of FAMILIES (default 'dinov2').
      resolution: height and width of the training images in pixels.
      image_size: pixels that the network receives; by default the family's `pixels` * resolution // 256, as published.
      dtype: compute dtype.

    Returns:
      Encoder.

    Raises:
      ValueError: for an unknown architecture, family, activation or field, a field that is missing, or sizes that do not
        divide.

    Reference: REPA-E `train_repae.py` `preprocess_raw_image`.
    """
    name, family, fields = _architecture(architecture)
    if image_size is None:
        image_size = family.pixels * resolution // 256
    patch_size = fields["patch_size"]
    if image_size < patch_size or image_size % patch_size:
        below = image_size // patch_size * patch_size
        allowed = " or ".join(str(size) for size in (below, below + patch_size) if size)
        raise ValueError(
            f"encoder {name!r}: image_size {image_size} (resolution {resolution}) is not a multiple of its patch size "
            f"{patch_size}; set the encoder's image_size to e.g. {allowed}, or use another patch_size"
        )
    grid = image_size // patch_size
    module = VisionTransformer(grid=(grid, grid), dtype=dtype, **fields)
    return Encoder(name, module, image_size, family.mean, family.std)


def _architecture(architecture):
    """(name, Family, all fields of VisionTransformer but grid and dtype)."""
    name = architecture if isinstance(architecture, str) else None
    if name is not None:
        if name not in ARCHITECTURES:
            raise ValueError(
                f"encoder architecture {name!r} is unknown; allowed: {', '.join(ARCHITECTURES)}, "
                f"or a mapping with {', '.join(_REQUIRED)}"
            )
        architecture = ARCHITECTURES[name]
    if not isinstance(architecture, Mapping):
        raise ValueError(f"encoder architecture {architecture!r} must be a name or a mapping with {', '.join(_REQUIRED)}")
    given = dict(architecture)
    unknown = sorted(set(given) - {*_REQUIRED, *_OPTIONAL})
    missing = [field for field in _REQUIRED if field not in given]
    if unknown or missing:
        raise ValueError(
            f"encoder architecture has unknown fields {unknown} and lacks {missing}; "
            f"needed: {', '.join(_REQUIRED)}; optional: {', '.join(_OPTIONAL)}"
        )
    for field, rule in _NUMBERS.items():
        if field in given:
            check(f"encoder architecture: {field}", rule, given[field])
    family = given.pop("family", "dinov2")
    if family not in FAMILIES:
        raise ValueError(f"encoder architecture: family {family!r} is unknown; allowed: {', '.join(FAMILIES)}")
    fields = {"mlp_dim": 4 * given["hidden_size"], **FAMILIES[family].fields, **given}
    fields["unbiased"] = tuple(fields.get("unbiased", ()))
    for field, values, allowed in (
        ("activation", [fields.get("activation", "gelu")], ACTIVATIONS),
        ("unbiased", fields["unbiased"], PROJECTIONS),
    ):
        for value in values:
            if value not in allowed:
                raise ValueError(f"encoder architecture: {field} {value!r} is unknown; allowed: {', '.join(allowed)}")
    if fields["hidden_size"] % fields["num_heads"]:
        raise ValueError(
            f"encoder architecture: hidden_size {fields['hidden_size']} is not divisible by num_heads "
            f"{fields['num_heads']}; change one of them"
        )
    described = f"vit-{fields['hidden_size']}x{fields['depth']}-patch{fields['patch_size']}"
    return name or described, FAMILIES[family], fields


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

    CLIP's published order is the reverse; the two agree, because the resize keeps constants.

    Args:
      encoder: Encoder.
      images: uint8 [B, H, H, 3].

    Returns:
      float32 [B, S, S, 3], S the encoder's image_size, (x / 255 - mean) / std.

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
    """Target tokens: the patch tokens that VisionTransformer gives, without class and register tokens; normalised over the
    positions if the encoder says so.

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
        _, patches = encoder.module.apply({"params": unsharded(params)}, preprocess(encoder, images))
        if encoder.spatial_gamma is not None:
            patches = spatial_normalize(patches, encoder.spatial_gamma)
        return jax.lax.stop_gradient(patches)


def resample_positions(pos_embed, grid, num_prefix=1):
    """Position embedding for another grid: the class token's is kept, the others are resampled.

    Args:
      pos_embed: [1, num_prefix + N, D], N a square number, rows first.
      grid: tokens per side of the result.
      num_prefix: how many of the tokens are no patches.

    Returns:
      float32 [1, num_prefix + grid ** 2, D].

    Raises:
      ValueError: if the shape is another one.

    Reference: timm `resample_abs_pos_embed` (bicubic, antialiased), called by REPA-E `utils.py` `load_encoders`.
    """
    pos_embed = jnp.asarray(pos_embed, jnp.float32)
    old = math.isqrt(max(pos_embed.shape[1] - num_prefix, 0)) if pos_embed.ndim == 3 else 0
    if not old or pos_embed.shape[:2] != (1, num_prefix + old**2):
        raise ValueError(
            f"position embedding has shape {pos_embed.shape}; allowed: [1, {num_prefix} + N, D] with N a square number, "
            "the class token's first"
        )
    if grid == old:
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
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


def spatial_normalize(tokens, gamma):
    """(x - gamma * mean) / (std + 1e-6) per image and channel, over the tokens: contrast between positions instead of content.

    Args:
      tokens: [B, T, F] with T >= 2, an encoder's patch tokens.
      gamma: share of the mean that is subtracted, 0 to 1; 0.6 by default in the published code.

    Returns:
      float32 [B, T, F].

    Raises:
      ValueError: for another shape or gamma.

    Reference: iREPA `ldm/utils.py` `spatial_zscore`.
    """
    if tokens.ndim != 3 or tokens.shape[1] < 2:
        raise ValueError(f"tokens have shape {tokens.shape}; allowed: [B, T, F] with T >= 2")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma {gamma}; allowed: 0 to 1")
    x = tokens.astype(jnp.float32)
    mean = jnp.mean(x, axis=1, keepdims=True)
    return (x - gamma * mean) / (jnp.std(x, axis=1, ddof=1, keepdims=True) + 1e-6)  # ddof: torch's std is the unbiased one
