"""Tables and helpers that the configs share."""

# alignment tap after block 4 for S and B, 8 for L and XL, as published
SIT_SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6, "encoder_depth": 4},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12, "encoder_depth": 4},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "encoder_depth": 8},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "encoder_depth": 8},
}
PATCH_SIZES = (1, 2, 4, 8)

VAES = {
    # SD-VAE: 256 px -> 32 x 32 x 4
    "f8d4": {"latent_channels": 4, "channel_multipliers": (1, 2, 4, 4), "attention_levels": (), "quant_convs": True},
    # FLUX and Stable Diffusion 3.5: 256 px -> 32 x 32 x 16
    "f8d16": {"latent_channels": 16, "channel_multipliers": (1, 2, 4, 4), "attention_levels": (), "quant_convs": False},
    # IN-VAE and VA-VAE: 256 px -> 16 x 16 x 32, attention at 16 x 16
    "f16d32": {"latent_channels": 32, "channel_multipliers": (1, 1, 2, 2, 4), "attention_levels": (4,), "quant_convs": True},
}

_DINOV2_SIZES = ("small", "base", "large", "giant")
# architecture -> its weights: names on the hub, and for MoCo v3, the file that the authors of RCG give to download
ENCODERS = {
    **{f"dinov2-{size}": f"facebook/dinov2-{size}" for size in _DINOV2_SIZES},
    **{f"dinov2-{size}-with-registers": f"facebook/dinov2-with-registers-{size}" for size in _DINOV2_SIZES},
    **{f"dinov3-vit{size}16": f"facebook/dinov3-vit{size}16-pretrain-lvd1689m" for size in "sbl"},
    "dino-vitb16": "facebook/dino-vitb16",
    "clip-vit-large-patch14": "openai/clip-vit-large-patch14",
    "ijepa_vith14_1k": "facebook/ijepa_vith14_1k",
    "vit-mae-large": "facebook/vit-mae-large",
    "siglip2-base-patch16-256": "google/siglip2-base-patch16-256",
    "siglip2-so400m-patch16-256": "google/siglip2-so400m-patch16-256",
    "mocov3-small": "mocov3_vits.pth",
    "mocov3-base": "mocov3_vitb.pth",
    "mocov3-large": "mocov3_vitl.pth",
}


def parse_arg(arg, presets, **defaults):
    """Reads what follows the colon in `--config file.py:ARG`.

    Args:
      arg: comma-separated; a bare word is a preset, `key=value` sets an argument, converted to its default's type.
      presets: allowed bare words; '' is the default one.
      **defaults: allowed keys and their defaults.

    Returns:
      (preset, dict of arguments).

    Raises:
      ValueError: for an unknown preset or key, more than one preset, or a value of the wrong type.
    """
    preset, values = "", dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            if part not in presets or preset:
                raise ValueError(
                    f"preset {part!r} in {arg!r} is unknown or a second one; allowed: one of {sorted(filter(None, presets))}"
                )
            preset = part
        elif key not in defaults:
            raise ValueError(f"config argument {key!r} in {arg!r} is unknown; allowed: {sorted(defaults)}")
        else:
            try:
                values[key] = type(defaults[key])(value)
            except ValueError:
                raise ValueError(f"config argument {part!r}: expected a value like {defaults[key]!r}") from None
    return preset, values


def choose(what, name, table):
    """table[name], or a ValueError that lists the allowed names."""
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; allowed: {', '.join(map(str, table))}")
    return table[name]


def sit_fields(name):
    """Fields of a SiT by its published name, such as 'XL/2'."""
    size, _, patch = name.partition("/")
    if not patch.isdigit() or int(patch) not in PATCH_SIZES:
        raise ValueError(f"SiT {name!r}: expected SIZE/PATCH with SIZE in {list(SIT_SIZES)} and PATCH in {list(PATCH_SIZES)}")
    return {**choose("SiT size", size, SIT_SIZES), "patch_size": int(patch)}
