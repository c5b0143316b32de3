"""Frozen encoders: Hugging Face folders and MoCo v3's files <-> our vision transformer.

Weights behind the tokens that are used here are not read: heads, poolers, the text side, and CLIP's and MAE's final norm,
which is written as scale 1 and bias 0. Kinds of files are entries of `vit_formats.FORMATS`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from checkpoints_tools import locate, mapping, weights
from checkpoints_tools.mapping import COPY, LINEAR, Entry, StateDict, Table, Tree
from checkpoints_tools.vit_formats import FORMATS, MOCOV3, MOCOV3_HEADS, VISION_PARTS, Format
from repae_jax import files
from repae_jax.models import encoders
from repae_jax.models.vit import SWIGLU, VisionTransformer
from repae_jax.ranges import Extent

# key of config.json -> field of VisionTransformer, where a format has the key
_FIELDS = {
    "patch_size": "patch_size", "hidden_size": "hidden_size", "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads", "intermediate_size": "mlp_dim", "layer_norm_eps": "norm_eps",
    "num_register_tokens": "num_registers", "rope_theta": "rope_theta",
}
_MAY_BE_ZERO = ("layer_norm_eps", "num_register_tokens")
_TOKENS = ("cls_token", "register_tokens", "pos_embed")


def encoder_table(vit: VisionTransformer, format: Format) -> Table:
    """Table between the names in the format's files, `renames` applied, and the module's 'params'."""
    block = dict(format.block)
    if vit.activation == SWIGLU:
        block = {ours: theirs for ours, theirs in block.items() if not ours.startswith("mlp/")} | dict(format.gated)
    stacked = mapping.stack(_entries(vit, format, block, format.blocks, "{stack}/"), {"blocks": range(vit.depth)})
    width = vit.hidden_size
    constants = {name: np.zeros((*shape, width), np.float32) for name, shape in format.zeros.items()}
    if not vit.final_norm:
        constants[f"{format.names['norm']}.weight"] = np.ones(width, np.float32)
        constants[f"{format.names['norm']}.bias"] = np.zeros(width, np.float32)
    if not vit.num_registers and "register_tokens" in format.names:
        constants[format.names["register_tokens"]] = np.zeros((1, 0, width), np.float32)
    return Table([*_entries(vit, format, format.names), *stacked], constants, format.ignored)


def _entries(vit, format, names, torch_prefix="", flax_prefix=""):
    """Entries of the parameters and layers in `names` that the module has."""
    layouts = {"patch_embed": mapping.patch_embedding(vit.patch_size), **format.layouts}
    absent = {
        "cls_token": not vit.num_class_tokens, "register_tokens": not vit.num_registers,
        "pos_embed": vit.rope_theta is not None, "pre_norm": not vit.pre_norm, "norm": not vit.final_norm,
        "layer_scale1": not vit.layer_scale, "layer_scale2": not vit.layer_scale,
    }
    entries = []
    for ours, theirs in names.items():
        if absent.get(ours):
            continue
        torch, paths = torch_prefix + theirs, [flax_prefix + path for path in ours.split()]
        part = ours.rpartition("/")[2]
        if "norm" in part:
            entries += mapping.norm(torch, *paths)
        elif part.startswith("layer_scale"):
            entries.append(Entry((torch,), (f"{paths[0]}/scale",)))
        elif part in _TOKENS:
            entries.append(Entry((torch,), (part,), layouts.get(part, COPY)))
        else:
            kernels = tuple(f"{path}/kernel" for path in paths)
            entries.append(Entry((f"{torch}.weight",), kernels, layouts.get(part, LINEAR)))
            if part not in vit.no_bias:
                entries.append(Entry((f"{torch}.bias",), tuple(f"{path}/bias" for path in paths)))
    return entries


class StoredEncoder(NamedTuple):
    """An encoder as its files hold it, in float32, on the grid of its stored positions."""

    architecture: Mapping[str, Any]  # as `encoders.make_encoder` takes it
    module: VisionTransformer
    params: dict[str, Any]


def load_encoder(
    path: str | Path, resolution: Extent, image_size: Extent | None = None, dtype: Any = jnp.float32
) -> tuple[encoders.Encoder, dict[str, Any]]:
    """Returns a frozen encoder from its published files, and its parameters, its positions resampled to the grid in use.

    Args:
      path: folder with config.json, of a model_type in FORMATS or of the whole model around such a one ('clip', 'siglip',
        'siglip2'), and its weights; or a hub name such as 'facebook/dinov2-base'; or MoCo v3's .pth file.
      resolution: pixels of the training images: a square's side, or (height, width).
      image_size: pixels that the network receives; by default as published, see encoders.FAMILIES.
    """
    encoder, params = at_resolution(read_file(locate.resolve(path)), resolution, image_size, dtype)
    return dataclasses.replace(encoder, name=str(path)), params


def read_file(path: Path, state_dict: StateDict | None = None) -> StoredEncoder:
    """Returns an encoder as its local file or folder holds it, whose arrays may have been read already."""
    format, config = format_of(path) if path.is_dir() else (MOCOV3, None)
    state_dict = rename(weights.read_file(path) if state_dict is None else state_dict, format, path)
    if config is None:
        architecture, side = _from_mocov3(state_dict, path)
    else:
        architecture, side = _from_config(format, config, f"{path}/config.json")
    try:
        module = _stored_module(architecture, side)
        pixels = (1, side * module.patch_size, side * module.patch_size, 3)
        target = mapping.abstract_variables(module, pixels)["params"]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = mapping.to_flax(encoder_table(module, format), state_dict, target, source=str(path))
    return StoredEncoder(architecture, module, params)


def at_resolution(
    stored: StoredEncoder, resolution: Extent, image_size: Extent | None = None, dtype: Any = jnp.float32
) -> tuple[encoders.Encoder, dict[str, Any]]:
    """Returns `load_encoder`'s result for an encoder that has been read."""
    encoder = encoders.make_encoder(stored.architecture, resolution, image_size=image_size, dtype=dtype)
    params = dict(stored.params)
    if "pos_embed" in params:
        resampled = encoders.resample_positions(params["pos_embed"], encoder.grid, encoder.module.num_class_tokens)
        params["pos_embed"] = np.asarray(resampled)
    return encoder, params


def _stored_module(architecture, side):
    size = side * architecture["patch_size"]
    return encoders.make_encoder(architecture, size, image_size=size).module


def format_of(folder: Path) -> tuple[Format, Mapping[str, Any]]:
    """Returns the Format of a local Hugging Face folder, and the part of config.json that describes the vision transformer."""
    config = files.read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type in VISION_PARTS:
        model_type, config = VISION_PARTS[model_type], config.get("vision_config") or {}
    if model_type not in FORMATS:
        raise ValueError(f"{folder}/config.json has model_type {model_type!r}; allowed: {', '.join([*FORMATS, *VISION_PARTS])}")
    return FORMATS[model_type], config


def rename(state_dict: StateDict, format: Format, source: str | Path) -> StateDict:
    """Returns a state dict under the format's names; ValueError if two of its names become one."""
    renamed = {}
    for name, array in state_dict.items():
        new = name
        for old, replacement in format.renames.items():
            if new.startswith(old):
                new = replacement + new.removeprefix(old)
        if new in renamed:
            raise ValueError(f"{source} holds {new} twice, once as {name}; allowed: one encoder per file")
        renamed[new] = array
    return renamed


def _from_config(format, given, source):
    """(architecture as encoders.make_encoder takes it, side of the position table)."""
    config = {**format.config, **given}

    def number(key, least=1):
        value = config[key]
        if isinstance(value, list) and len(set(value)) == 1:  # [height, width] of a square
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise ValueError(f"{source} has {key} {value!r}; allowed: a number of at least {least}, one for height and width")
        return value

    def check(key, allowed):
        if config[key] not in allowed:
            raise ValueError(f"{source} has {key} {config[key]!r}; allowed: {', '.join(map(repr, allowed))}")

    check("num_channels", [3])
    if "mlp_bias" in format.config:
        check("mlp_bias", [True])
    gated = format.gate is not None and config[format.gate[0]]
    check("hidden_act", [format.gate[1]] if gated else list(format.activations))
    fields = {ours: number(key, int(key not in _MAY_BE_ZERO)) for key, ours in _FIELDS.items() if key in format.config}
    fields |= {"family": format.family, "activation": SWIGLU if gated else format.activations[config["hidden_act"]]}
    if "mlp_dim" not in fields:
        fields["mlp_dim"] = _dinov2_mlp_dim(fields["hidden_size"], number("mlp_ratio"), gated)
    if format.biases:
        fields["no_bias"] = tuple(name for key, names in format.biases.items() if not config[key] for name in names)
    if "num_patches" not in format.config:
        return fields, number("image_size") // fields["patch_size"]
    side = math.isqrt(number("num_patches"))
    if side**2 != config["num_patches"]:
        raise ValueError(f"{source} has num_patches {config['num_patches']}; allowed: a square number")
    return fields, side


def _dinov2_mlp_dim(hidden_size, mlp_ratio, gated):
    """DINOv2's MLP width; its SwiGLU has two thirds of it, rounded up to a multiple of 8."""
    width = int(hidden_size * mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _from_mocov3(state_dict, source):
    """Returns the same as `_from_config`, from the sizes of the weights."""

    def shape(name, rank):
        actual = np.shape(state_dict[name]) if name in state_dict else None
        if actual is None or len(actual) != rank:
            problem = f"{name} has shape {actual}, needed are {rank} axes; of other encoders, give the folder with config.json"
            raise ValueError(f"{source} is no MoCo v3 checkpoint of a vision transformer: {problem}")
        return actual

    hidden_size, _, patch_size, _ = shape("patch_embed.proj.weight", 4)
    positions = shape("pos_embed", 3)[1]
    if hidden_size not in MOCOV3_HEADS:
        raise ValueError(f"{source} has width {hidden_size}; allowed: {', '.join(map(str, MOCOV3_HEADS))} (MoCo v3's S, B, L)")
    side = math.isqrt(max(positions - 1, 0))
    if positions != 1 + side**2:
        raise ValueError(f"{source} has {positions} positions in pos_embed; allowed: 1 + a square number")
    depth, mlp_dim = max(mapping.count_layers(state_dict, "blocks"), 1), shape("blocks.0.mlp.fc1.weight", 2)[0]
    fields = {"family": MOCOV3.family, "patch_size": patch_size, "hidden_size": hidden_size, "mlp_dim": mlp_dim}
    return fields | {"depth": depth, "num_heads": MOCOV3_HEADS[hidden_size]}, side


def save_encoder(folder: str | Path, module: VisionTransformer, params: Tree, *, overwrite: bool = False) -> None:
    """Writes a folder that `load_encoder` and transformers' from_pretrained read, of the first model_type that fits.

    MoCo v3 becomes a 'vit', and NaFlex a 'siglip_vision_model' of its grid's size. The folder is local or an address such as
    gs://bucket/folder, and is created if absent. ValueError if no config.json can express the module.
    """
    format, config = _config_of(module)
    state_dict = mapping.to_torch(encoder_table(module, format), params)
    weights_file, config_file = epath.Path(folder) / "model.safetensors", epath.Path(folder) / "config.json"
    writes = {weights_file: weights.safetensors_writer(state_dict, weights_file, {"format": "pt"})}  # transformers asks for it
    writes[config_file] = files.json_writer(config, config_file)  # last: a folder without it does not count as an encoder
    weights.write_files(writes, overwrite=overwrite)


def _config_of(module):
    """(Format, config.json) of the first format whose config.json is read as this very module."""
    for model_type, format in FORMATS.items():
        config = _config_values(module, format)
        try:
            architecture, side = _from_config(format, config, model_type)
        except ValueError:
            continue
        if _stored_module(architecture, side) == module.clone(dtype=jnp.float32):
            return format, {"architectures": [format.model_class], "model_type": model_type, **config, **format.extra}
    advice = "all know square grids only, and DINOv2's an mlp_dim that is a whole multiple of hidden_size"
    raise ValueError(f"no config.json of {', '.join(FORMATS)} can express {module}; {advice}")


def _config_values(module, format):
    """The format's keys of config.json with the module's values, None where it has no such value."""
    rows, columns = module.grid
    gated = module.activation == SWIGLU
    activations = [theirs for theirs, ours in format.activations.items() if ours == module.activation]
    if format.gate is not None and gated:
        activations = [format.gate[1]]
    ratios = (ratio for ratio in range(1, 33) if _dinov2_mlp_dim(module.hidden_size, ratio, gated) == module.mlp_dim)
    values = {
        "num_channels": 3, "image_size": rows * module.patch_size, "num_patches": rows * columns,
        "mlp_ratio": next(ratios, None), "mlp_bias": True, "hidden_act": activations[0] if activations else None,
        **{key: getattr(module, ours) for key, ours in _FIELDS.items()},
        **{key: not set(names) & set(module.no_bias) for key, names in format.biases.items()},
        **({format.gate[0]: gated} if format.gate is not None else {}),
    }
    return {key: values[key] for key in format.config}
