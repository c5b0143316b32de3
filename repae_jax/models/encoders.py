"""Images -> target tokens of the frozen encoders.

A family of encoders is one entry of FAMILIES: its preprocessing, its network and the sizes that were released. How a family's
files are laid out is checkpoints_tools/vit_formats.py's.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from repae_jax.distributed.sharding import unsharded
from repae_jax.models.vit import ACTIVATIONS, PROJECTIONS, VisionTransformer
from repae_jax.ranges import Extent, OrNone, as_extent, check, height_width, in_words, real, whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Encoders that were trained alike; all that is known of them but the layout of their files.

    The module is called as module(grid=(rows, columns), dtype=..., **fields), and needs the fields patch_size, hidden_size and
    attention, as VisionTransformer has them.
    """

    pixels: int  # side that an image of 256 pixels is resized to; in proportion for other sizes
    architectures: "Mapping[str, Release]"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # shared by all, where they differ from the defaults
    mean: tuple[float, float, float] = IMAGENET_MEAN  # mean of each channel, for pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    module: Callable[..., nn.Module] = VisionTransformer
    tokens: Callable[[Any], Float[Array, "B T F"]] = operator.itemgetter(1)  # from the module's outputs, rows first


@dataclasses.dataclass(frozen=True, eq=False)
class Release:
    """One released encoder."""

    weights: str  # name on the hub, or of the file that its authors give to download
    fields: Mapping[str, Any]  # the module's sizes


def _vit(weights, patch_size, hidden_size, depth, num_heads, **fields):
    sizes = {"patch_size": patch_size, "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
    return Release(weights, {**sizes, "mlp_dim": 4 * hidden_size, **fields})


def _dinov2(suffix="", **fields):
    hub = f"facebook/dinov2{suffix}"
    return {
        f"dinov2-small{suffix}": _vit(f"{hub}-small", 14, 384, 12, 6, **fields),
        f"dinov2-base{suffix}": _vit(f"{hub}-base", 14, 768, 12, 12, **fields),
        f"dinov2-large{suffix}": _vit(f"{hub}-large", 14, 1024, 24, 16, **fields),
        f"dinov2-giant{suffix}": _vit(f"{hub}-giant", 14, 1536, 40, 24, activation="swiglu", mlp_dim=4096, **fields),
    }


# Tokens, pixels and statistics are those of REPA's and REPA-E's `preprocess_raw_image`, `load_encoders` and models/ for all but
# the last two families. The norms' epsilons are those of the Hugging Face folders; the original DINO and MAE have 1e-6.
FAMILIES = {
    # x_norm_patchtokens, with registers too
    "dinov2": Family(pixels=224, architectures={**_dinov2(), **_dinov2("-with-registers", num_registers=4)}),
    "dino": Family(
        pixels=256, architectures={"dino-vitb16": _vit("facebook/dino-vitb16", 16, 768, 12, 12)},
        fields={"layer_scale": False, "norm_eps": 1e-12},
    ),
    "mocov3": Family(pixels=256, fields={"layer_scale": False}, architectures={  # RCG's checkpoints
        "mocov3-small": _vit("mocov3_vits.pth", 16, 384, 12, 12),
        "mocov3-base": _vit("mocov3_vitb.pth", 16, 768, 12, 12),
        "mocov3-large": _vit("mocov3_vitl.pth", 16, 1024, 24, 16),
    }),
    "mae": Family(  # after the last block, before the final norm: mae_vit.py leaves it out
        pixels=256, architectures={"vit-mae-large": _vit("facebook/vit-mae-large", 16, 1024, 24, 16)},
        fields={"layer_scale": False, "final_norm": False, "norm_eps": 1e-12},
    ),
    "ijepa": Family(
        pixels=224, architectures={"ijepa_vith14_1k": _vit("facebook/ijepa_vith14_1k", 14, 1280, 32, 16)},
        fields={"layer_scale": False, "num_class_tokens": 0},
    ),
    "clip": Family(  # before the final norm: clip_vit.py leaves it out
        pixels=224, architectures={"clip-vit-large-patch14": _vit("openai/clip-vit-large-patch14", 14, 1024, 24, 16)},
        fields={
            "layer_scale": False, "activation": "quick_gelu", "no_bias": ("patch_embed",), "pre_norm": True,
            "final_norm": False, "norm_eps": 1e-5,
        },
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
    ),
    # tokens and pixels: iREPA's `vision_encoder.py`; statistics: the models' preprocessor_config.json, where iREPA gives
    # SigLIP 2 ImageNet's
    "dinov3": Family(
        pixels=256, fields={"num_registers": 4, "rope_theta": 100.0, "no_bias": ("key",), "norm_eps": 1e-5},
        architectures={
            "dinov3-vits16": _vit("facebook/dinov3-vits16-pretrain-lvd1689m", 16, 384, 12, 6),
            "dinov3-vitb16": _vit("facebook/dinov3-vitb16-pretrain-lvd1689m", 16, 768, 12, 12),
            "dinov3-vitl16": _vit("facebook/dinov3-vitl16-pretrain-lvd1689m", 16, 1024, 24, 16),
        },
    ),
    "siglip2": Family(
        pixels=256, fields={"layer_scale": False, "activation": "gelu_tanh", "num_class_tokens": 0},
        architectures={
            "siglip2-base-patch16-256": _vit("google/siglip2-base-patch16-256", 16, 768, 12, 12),
            "siglip2-so400m-patch16-256": _vit("google/siglip2-so400m-patch16-256", 16, 1152, 27, 16, mlp_dim=4304),
        },
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    ),
}  # fmt: skip
# name -> its family and the module's sizes, as make_encoder takes them
ARCHITECTURES = {
    name: {"family": family, **release.fields}
    for family, members in FAMILIES.items() for name, release in members.architectures.items()
}  # fmt: skip

# fields of an architecture that is given as a mapping
_REQUIRED = ("patch_size", "hidden_size", "depth", "num_heads")
_OPTIONAL = ("family", "mlp_dim", "activation", "num_registers", "rope_theta", "no_bias", "norm_eps")
_NUMBERS = dict.fromkeys((*_REQUIRED, "mlp_dim"), whole(1, 2**20)) | {
    "num_registers": whole(0, 2**20), "rope_theta": OrNone(real(above=0)), "norm_eps": real(above=0)
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen encoder without its parameters."""

    name: str  # for messages and logs
    family: Family
    module: nn.Module
    image_size: int | tuple[int, int]  # pixels that the network receives: a square's side, or (height, width)
    spatial_gamma: float | None = None  # share of the mean that `spatial_normalize` subtracts; None is no normalization

    @property
    def grid(self) -> int | tuple[int, int]:
        """Tokens per side of a square, otherwise (rows, columns)."""
        return as_extent([side // self.module.patch_size for side in height_width(self.image_size)])

    @property
    def num_tokens(self) -> int:
        """Number T of tokens of an image."""
        return math.prod(height_width(self.grid))


def make_encoder(
    architecture: str | Mapping[str, Any], resolution: Extent, *,
    image_size: Extent | None = None, dtype: DTypeLike = jnp.float32,
) -> Encoder:  # fmt: skip
    """Describes the encoder for training images of one resolution.

    An extent is a square's side, or (height, width).

    Args:
      architecture: a name in ARCHITECTURES, or a mapping of VisionTransformer's patch_size, hidden_size, depth, num_heads
        and optionally mlp_dim (default 4 * hidden_size), activation, num_registers, rope_theta, no_bias, norm_eps, whose
        defaults depend on its `family`, one of FAMILIES (default 'dinov2').
      resolution: pixels of the training images.
      image_size: pixels that the network receives; by default the family's `pixels` * resolution // 256 on each side, as
        published for squares.

    Reference: REPA-E `train_repae.py` `preprocess_raw_image`.
    """
    name, family, fields = _released(architecture) if isinstance(architecture, str) else _described(architecture)
    if image_size is None:
        image_size = [family.pixels * side // 256 for side in height_width(resolution)]
    sides = height_width(image_size)
    patch_size = fields["patch_size"]
    if min(sides) < patch_size or any(side % patch_size for side in sides):
        below = [side // patch_size * patch_size for side in sides]
        multiples = [below, [side + patch_size for side in below]]
        allowed = " or ".join(str(as_extent(pair)) for pair in multiples if min(pair))
        raise ValueError(
            f"encoder {name!r}: image_size {in_words(sides)} (resolution {in_words(resolution)}) is not a multiple of its "
            f"patch size {patch_size}; set the encoder's image_size to e.g. {allowed}, or use another patch_size"
        )
    grid = tuple(side // patch_size for side in sides)
    return Encoder(name, family, family.module(grid=grid, dtype=dtype, **fields), as_extent(sides))


def _released(name):
    """Returns (name, Family, the module's fields), as `_described` does."""
    for family in FAMILIES.values():
        if name in family.architectures:
            return name, family, {**family.fields, **family.architectures[name].fields}
    allowed = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise ValueError(f"encoder architecture {name!r} is unknown; allowed: {allowed}, or a mapping with {', '.join(_REQUIRED)}")


def _described(architecture):
    if not isinstance(architecture, Mapping):
        raise ValueError(f"encoder architecture {architecture!r} must be a name or a mapping with {', '.join(_REQUIRED)}")
    given = dict(architecture)
    unknown = sorted(set(given) - {*_REQUIRED, *_OPTIONAL})
    missing = [field for field in _REQUIRED if field not in given]
    if unknown or missing:
        allowed = f"needed: {', '.join(_REQUIRED)}; optional: {', '.join(_OPTIONAL)}"
        raise ValueError(f"encoder architecture has unknown fields {unknown} and lacks {missing}; {allowed}")
    for field, rule in _NUMBERS.items():
        if field in given:
            check(f"encoder architecture: {field}", rule, given[field])
    family = given.pop("family", "dinov2")
    families = {name: family for name, family in FAMILIES.items() if family.module is VisionTransformer}
    if family not in families:
        raise ValueError(f"encoder architecture: family {family!r} is unknown; allowed: {', '.join(families)}")
    fields = {"mlp_dim": 4 * given["hidden_size"], **families[family].fields, **given}
    if "no_bias" in fields:
        fields["no_bias"] = tuple(fields["no_bias"])
    activation, no_bias = fields.get("activation", "gelu"), fields.get("no_bias", ())
    for field, values, allowed in (("activation", [activation], ACTIVATIONS), ("no_bias", no_bias, PROJECTIONS)):
        for value in values:
            if value not in allowed:
                raise ValueError(f"encoder architecture: {field} {value!r} is unknown; allowed: {', '.join(allowed)}")
    width, heads = fields["hidden_size"], fields["num_heads"]
    if width % heads:
        raise ValueError(f"encoder architecture: hidden_size {width} is not divisible by num_heads {heads}; change one of them")
    return f"vit-{width}x{fields['depth']}-patch{fields['patch_size']}", families[family], fields


def init_params(encoder: Encoder, key: Array) -> Mapping[str, Any]:
    """Returns random float32 parameters of an encoder; under `jax.eval_shape` their shapes alone."""
    return encoder.module.init(key, jnp.zeros((1, *height_width(encoder.image_size), 3)))["params"]


def preprocess(encoder: Encoder, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B height width 3"]:
    """Returns (images / 255 - mean) / std in float32, resized to the network's image_size.

    ValueError if that would distort them. CLIP's published order is the reverse; the two agree, because the resize keeps
    constants.

    Reference: REPA-E `train_repae.py` `preprocess_raw_image`.
    """
    height, width = height_width(encoder.image_size)
    if (
        images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[3] != 3
        or images.shape[1] * width != images.shape[2] * height
    ):  # fmt: skip
        shape = "[B, H, H, 3]" if height == width else f"[B, H, W, 3], H : W as {height} : {width},"
        allowed = f"uint8 {shape} with values 0..255; pass the images before any normalization"
        raise ValueError(f"encoder {encoder.name!r} got {images.dtype} {list(images.shape)}; allowed: {allowed}")
    x = images.astype(jnp.float32) / 255
    x = (x - np.asarray(encoder.family.mean, np.float32)) / np.asarray(encoder.family.std, np.float32)
    return resize_bicubic(x, height, width)


def resize_bicubic(images: Float[Array, "B H W C"], height: int, width: int) -> Float[Array, "B height width C"]:
    """Resizes as torch.nn.functional.interpolate(mode='bicubic', align_corners=False); returns `images` if the size agrees."""
    if images.shape[1:3] == (height, width):
        return images
    # torch's kernel has a = -0.75, repeats the edge pixels and does not antialias; plain 'bicubic' differs in all three
    shape = (images.shape[0], height, width, images.shape[3])
    return jax.image.resize(images, shape, method="bicubic-pytorch", antialias=False)


def encode(encoder: Encoder, params: Mapping[str, Any], images: UInt8[Array, "B H W 3"]) -> Float[Array, "B T F"]:
    """Returns the target tokens of images, rows first, T = num_tokens; no gradient flows through them."""
    with jax.named_scope("encoder"):
        outputs = encoder.module.apply({"params": unsharded(params)}, preprocess(encoder, images))
        tokens = encoder.family.tokens(outputs)
        if encoder.spatial_gamma is not None:
            tokens = spatial_normalize(tokens, encoder.spatial_gamma)
        return jax.lax.stop_gradient(tokens)


def resample_positions(pos_embed: Float[Array, "1 P+N D"], grid: Extent, num_prefix: int = 1) -> Float[Array, "1 P+T D"]:
    """Resamples the positions of N patches of a square, rows first, for a grid of T; P = num_prefix tokens before are kept.

    The grid is the side of a square, or (rows, columns).

    Reference: timm `resample_abs_pos_embed` (bicubic, antialiased), called by REPA-E `utils.py` `load_encoders`.
    """
    pos_embed = jnp.asarray(pos_embed, jnp.float32)
    old = math.isqrt(max(pos_embed.shape[1] - num_prefix, 0)) if pos_embed.ndim == 3 else 0
    if not old or pos_embed.shape[:2] != (1, num_prefix + old**2):
        allowed = f"[1, {num_prefix} + N, D] with N a square number, the class token's first"
        raise ValueError(f"position embedding has shape {pos_embed.shape}; allowed: {allowed}")
    rows, columns = height_width(grid)
    if (rows, columns) == (old, old):
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    width = pos_embed.shape[2]
    # antialiasing torch resizes with a = -0.5 and renormalized edges, as JAX's 'bicubic' does
    patches = jax.image.resize(patches.reshape(1, old, old, width), (1, rows, columns, width), "bicubic", antialias=True)
    return jnp.concatenate([prefix, patches.reshape(1, rows * columns, width)], axis=1)


def check_grid(encoder: Encoder, token_grid: Extent) -> None:
    """Raises ValueError unless the encoder's tokens and the SiT's lie on the same grid, a square's side or (rows, columns)."""
    (rows, columns), patch_size = height_width(token_grid), encoder.module.patch_size
    ours = height_width(encoder.grid)
    if ours != (rows, columns):
        raise ValueError(
            f"encoder {encoder.name!r} gives {ours[0]} x {ours[1]} tokens ({in_words(encoder.image_size)} pixels, patches of "
            f"{patch_size}), the SiT has {rows} x {columns}; set the encoder's image_size to "
            f"{as_extent((rows * patch_size, columns * patch_size))}, or change the SiT's patch_size or the VAE's downsampling "
            "factor"
        )


def spatial_normalize(tokens: Float[Array, "B T F"], gamma: float) -> Float[Array, "B T F"]:
    """Returns (x - gamma * mean) / (std + 1e-6) per image and channel, over the tokens, in float32.

    It keeps the contrast between positions rather than the content of the whole image.

    Reference: iREPA `ldm/utils.py` `spatial_zscore`, where gamma is 0.6 by default.
    """
    if tokens.ndim != 3 or tokens.shape[1] < 2:
        raise ValueError(f"tokens have shape {tokens.shape}; allowed: [B, T, F] with T >= 2")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma {gamma}; allowed: 0 to 1")
    x = tokens.astype(jnp.float32)
    mean = jnp.mean(x, axis=1, keepdims=True)
    return (x - gamma * mean) / (jnp.std(x, axis=1, ddof=1, keepdims=True) + 1e-6)  # ddof: torch's std is the unbiased one
