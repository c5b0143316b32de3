"""Tables of networks, the arguments after the colon, and the small presets, which all configs share."""

import copy
import functools
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from repae_jax.models.encoders import FAMILIES
from repae_jax.models.vae_families import RAE, VTP

# alignment tap after block 4 for S and B, 8 for L and XL, as published
SIT_SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6, "encoder_depth": 4},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12, "encoder_depth": 4},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "encoder_depth": 8},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "encoder_depth": 8},
}
PATCH_SIZES = (1, 2, 4, 8)
SMALL = ("digits", "tiny")  # presets of every file
SIZES = ("sit", "model", "vae", "resolution")  # arguments that these presets override

VAES = {
    # SD-VAE: 256 px -> 32 x 32 x 4
    "f8d4": {"latent_channels": 4, "channel_multipliers": (1, 2, 4, 4), "attention_levels": (), "quant_convs": True},
    # FLUX and Stable Diffusion 3.5: 256 px -> 32 x 32 x 16
    "f8d16": {"latent_channels": 16, "channel_multipliers": (1, 2, 4, 4), "attention_levels": (), "quant_convs": False},
    # IN-VAE and VA-VAE: 256 px -> 16 x 16 x 32, attention at 16 x 16
    "f16d32": {"latent_channels": 32, "channel_multipliers": (1, 1, 2, 2, 4), "attention_levels": (4,), "quant_convs": True},
}

# RAE (arXiv 2510.11690): DINOv2 with registers, and the ViT-XL decoder of nyu-visionx/RAE-dinov2-wReg-*-ViTXL-n08; 256 px ->
# 16 x 16 x 768, 512 px -> 32 x 32 x 768
_RAES = {
    f"rae-dinov2-{size}": {
        "family": RAE, "latent_channels": width, "patch_size": 16,
        "encoder_patch_size": 14, "encoder_depth": depth, "encoder_heads": width // 64, "encoder_table": 37,
        "decoder_hidden_size": 1152, "decoder_depth": 28, "decoder_heads": 16, "decoder_mlp_dim": 4096,
    }
    for size, width, depth in (("small", 384, 12), ("base", 768, 12), ("large", 1024, 24))
}  # fmt: skip
# VTP (arXiv 2512.13687): MiniMaxAI/VTP-Large-f16d64's config.json, and the defaults of its class; 256 px -> 16 x 16 x 64
_VTPS = {
    f"vtp-{size}": {
        "family": VTP, "latent_channels": 64, "patch_size": 16,
        "encoder_hidden_size": width, "encoder_depth": depth, "encoder_heads": heads,
        "decoder_hidden_size": width, "decoder_depth": depth, "decoder_heads": heads,
    }
    for size, width, depth, heads in (("base", 768, 12, 12), ("large", 1024, 24, 16))
}  # fmt: skip
OTHER_VAES = {**_RAES, **_VTPS}  # of other families than AutoencoderKL

# architecture -> its weights: names on the hub, and for MoCo v3, the file that the authors of RCG give to download
ENCODERS = {name: release.weights for family in FAMILIES.values() for name, release in family.architectures.items()}
ENCODER_FAMILIES = {name: key for key, family in FAMILIES.items() for name in family.architectures}


def parse_arg(arg: str, *words: Collection[str], **defaults: Any) -> tuple[Any, ...]:
    """Parses the text after the colon in `--config file.py:ARG`: bare words and `key=value`, separated by commas.

    At most one word of each collection in `words` may be given, and each key of `defaults` once, with a value of its type.

    Returns:
      The word of each collection, '' if none was given, and the dict of arguments.
    """
    chosen, values, given = [""] * len(words), dict(defaults), {}
    allowed = " and ".join(f"one of {sorted(collection)}" for collection in words)
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            index = next((index for index, collection in enumerate(words) if part in collection), None)
            if index is None:
                raise ValueError(f"preset {part!r} in {arg!r} is unknown; allowed: {allowed}")
            if chosen[index]:
                raise ValueError(f"preset {part!r} in {arg!r} is a second one beside {chosen[index]!r}; allowed: {allowed}")
            chosen[index] = part
            continue
        if key not in defaults:
            raise ValueError(f"config argument {key!r} in {arg!r} is unknown; allowed: {sorted(defaults)}")
        if key in given:
            raise ValueError(f"config arguments {given[key]!r} and {part!r} in {arg!r}: give one of them")
        given[key] = part
        try:
            values[key] = type(defaults[key])(value)
        except ValueError:
            raise ValueError(f"config argument {part!r}: expected a value like {defaults[key]!r}") from None
    small = next((word for word in chosen if word in SMALL), None)
    for key in SIZES:
        if small and key in given:
            raise ValueError(f"config argument {given[key]!r} and preset {small!r} in {arg!r} both set sizes: leave one out")
    return *chosen, values


def choose(what: str, name: str, table: Mapping[str, Any]) -> Any:
    """Returns table[name]; raises ValueError that lists the allowed names for an unknown one."""
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; allowed: {', '.join(map(str, table))}")
    return table[name]


def sit_fields(name: str) -> dict[str, int]:
    """Returns the sizes of a SiT by its published name, such as 'XL/2'."""
    size, _, patch = name.partition("/")
    if not patch.isdigit() or int(patch) not in PATCH_SIZES:
        raise ValueError(f"SiT {name!r}: expected SIZE/PATCH with SIZE in {list(SIT_SIZES)} and PATCH in {list(PATCH_SIZES)}")
    return {**choose("SiT size", size, SIT_SIZES), "patch_size": int(patch)}


def vae_files(stem: str, *fields: str) -> dict[str, str]:
    """Returns changes of `config.init` that start from REPA-E's files of a VAE, such as 'REPA-E/sdvae/sdvae-f8d4'."""
    endings = {"vae": ".pt", "latent_stats": "-latents-stats.pt", "disc": "-discriminator-ckpt.pt"}
    return {f"init.{field}": stem + endings[field] for field in fields}


def change(config: ConfigDict, changes: Mapping[str, Any]) -> list[str]:
    """Sets those dotted fields that an unlocked config has; returns the names of the others."""
    missing = []
    for name, value in changes.items():
        *sections, field = name.split(".")
        section = functools.reduce(lambda section, part: section.get(part, {}), sections, config)
        if field in section:
            section[field] = copy.deepcopy(value)
        else:
            missing.append(name)
    return missing


# ---- small presets of any config: the recipe stays, networks and data change ----------------------------------------

# 16 x 16 pixels, a factor-4 VAE with 4 x 4 latents, 16 tokens; no LPIPS, whose weights need a download
_DIGITS = {
    "steps": 1000, "precision.compute": "float32", "log.every": 25,
    "data.source": "digits", "data.image_size": 16, "data.num_classes": 10, "data.batch_size": 64, "data.workers": 0,
    "data.max_bad_fraction": 0.0,
    "vae.latent_channels": 8, "vae.channel_multipliers": (1, 2, 3), "vae.attention_levels": (), "vae.quant_convs": True,
    "vae.channels": 16, "vae.norm_groups": 8, "vae.num_res_blocks": 1,
    "vae.patch_size": 4, "vae.encoder_patch_size": 4, "vae.encoder_depth": 1, "vae.encoder_heads": 2, "vae.encoder_table": 4,
    "vae.encoder_hidden_size": 32, "vae.decoder_hidden_size": 32, "vae.decoder_depth": 2, "vae.decoder_heads": 2,
    "vae.decoder_mlp_dim": 64,
    "sit.patch_size": 1, "sit.hidden_size": 128, "sit.depth": 6, "sit.num_heads": 4, "sit.encoder_depth": 2,
    "sit.projector_dim": 256, "sit.remat": "none", "sit.unroll": 6,
    "disc.channels": 32, "disc.num_layers": 2, "loss.vae.lpips": 0.0,
    "init.checkpoint": "", "init.vae": "", "init.disc": "", "init.latent_stats": "", "init.stats_images": 512,
    "optim.vae.learning_rate": 1e-3, "optim.disc.learning_rate": 2e-4, "optim.sit.learning_rate": 1e-3,
    "checkpoint.every": 250, "checkpoint.keep_last": 1, "checkpoint.keep_every": 250,
    "hooks.images": 40, "hooks.samples_every": 250, "hooks.reconstructions_every": 250,
    "sampling.steps": 50, "sampling.guidance_scale": 1.5, "diffusion.time_shift": 1.0, "sampling.time_shift": 1.0,
}  # fmt: skip
_TINY = {
    "steps": 2, "data.batch_size": 8, "log.every": 1, "checkpoint.every": 2, "checkpoint.keep_every": placeholder(int),
    "vae.latent_channels": 4, "vae.channels": 8, "vae.channel_multipliers": (1, 1, 2),
    "sit.hidden_size": 32, "sit.depth": 2, "sit.num_heads": 2, "sit.encoder_depth": 1, "sit.projector_dim": 32,
    "disc.channels": 8, "init.stats_images": 16, "sampling.steps": 2,
    "hooks.images": 8, "hooks.samples_every": 2, "hooks.reconstructions_every": 2,
}  # fmt: skip


def latents(config: ConfigDict) -> int:
    """Returns of how many numbers the latents of an image are."""
    factor = config.vae.patch_size if "family" in config.vae else 2 ** (len(config.vae.channel_multipliers) - 1)
    side = config.data.image_size // factor
    return side**2 * config.vae.latent_channels


def shrink(config: ConfigDict, preset: str) -> None:
    """Applies the preset '', 'digits' or 'tiny' to an unlocked config of any job."""
    if not preset:
        return
    full_latents = latents(config)
    families = {name: ENCODER_FAMILIES[encoder.architecture] for name, encoder in config.encoders.items()}
    change(config, _DIGITS)
    for encoder in config.encoders.values():
        encoder.update(architecture=placeholder(object), weights="", image_size=16)
    if config.ema_decay:
        config.ema_decay = 0.99
    if config.loss.get("eq_scales"):
        config.disc.num_layers = 1  # leaves a logit at half the size
        config.loss.eq_scales = (1.0, 0.5)
    if preset == "tiny":
        change(config, _TINY)
        for name, encoder in config.encoders.items():
            sizes = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
            encoder.update(architecture={"family": families[name], **sizes}, weights="random")
        if config.job == "ldm" or not any(config.loss.vae.values()):
            config.init.vae = "random"  # a frozen VAE
    if config.loss.get("self_depth"):
        config.loss.self_depth = config.sit.depth
    if config.job == "ldm" and config.diffusion.mean_flow:
        config.sampling.update(steps=1, guidance_scale=1.0)
    if config.job == "repae":
        config.loss.vae.kl *= full_latents / latents(config)  # KL is a sum over latents, the other terms are means
