"""Frozen encoders: Hugging Face folders and MoCo v3's files <-> our vision transformer.

What follows the tokens that we take is not read: heads, poolers, the text side, and CLIP's and MAE's final norm, which is
written as scale 1 and bias 0.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from checkpoints_tools import locate, weights
from checkpoints_tools.mapping import COPY, LINEAR, Entry, Table, norm, patch_embedding, stack, to_flax, to_torch
from checkpoints_tools.vit_formats import FORMATS, MOCOV3, MOCOV3_HEADS, VISION_PARTS
from repae_jax.models import encoders as features
from repae_jax.models.vit import SWIGLU


def encoder_table(vit, format):
    """Conversion table of a VisionTransformer.

    Args:
      vit: the module (its sizes are read).
      format: one of FORMATS' values, or MOCOV3.

    Returns:
      Table between the names in the format's files, `renames` applied, and the module's 'params'.
    """
    absent = {
        "cls_token": not vit.num_class_tokens,
        "register_tokens": not vit.num_registers,
        "pos_embed": vit.rope_theta is not None,
        "pre_norm": not vit.pre_norm,
        "norm": not vit.final_norm,
        "layer_scale1": not vit.layer_scale,
        "layer_scale2": not vit.layer_scale,
    }
    layouts = {"patch_embed": patch_embedding(vit.patch_size), **format.layouts}

    def entries(names, torch_prefix="", flax_prefix=""):
        made = []
        for ours, theirs in names.items():
            if absent.get(ours):
                continue
            torch, paths = torch_prefix + theirs, [flax_prefix + path for path in ours.split()]
            part = ours.rpartition("/")[2]
            if "norm" in part:
                made += norm(torch, *paths)
            elif part.startswith("layer_scale"):
                made.append(Entry((torch,), (f"{paths[0]}/scale",)))
            elif part in ("cls_token", "register_tokens", "pos_embed"):
                made.append(Entry((torch,), (part,), layouts.get(part, COPY)))
            else:
                layer = Entry((f"{torch}.weight",), tuple(f"{path}/kernel" for path in paths), layouts.get(part, LINEAR))
                made.append(layer)
                if part not in vit.no_bias:
                    made.append(Entry((f"{torch}.bias",), tuple(f"{path}/bias" for path in paths)))
        return made

    block = dict(format.block)
    if vit.activation == SWIGLU:
        block = {ours: theirs for ours, theirs in block.items() if not ours.startswith("mlp/")} | dict(format.gated)
    stacked = stack(entries(block, format.blocks, "{stack}/"), {"blocks": range(vit.depth)})
    width = vit.hidden_size
    constants = {name: np.zeros((*shape, width), np.float32) for name, shape in format.zeros.items()}
    if not vit.final_norm:
        constants[f"{format.names['norm']}.weight"] = np.ones(width, np.float32)
        constants[f"{format.names['norm']}.bias"] = np.zeros(width, np.float32)
    if not vit.num_registers and "register_tokens" in format.names:
        constants[format.names["register_tokens"]] = np.zeros((1, 0, width), np.float32)
    return Table([*entries(format.names), *stacked], constants, format.ignored)


def load_encoder(path, resolution, image_size=None, dtype=jnp.float32):
    """Frozen encoder from its published files, its positions resampled to the grid in use.

    Args:
      path: folder with config.json, of a model_type in FORMATS or of the whole model around such a one ('clip', 'siglip',
        'siglip2'), and its weights; or a hub name such as 'facebook/dinov2-base'; or MoCo v3's .pth file.
      resolution: height and width of the training images in pixels.
      image_size: pixels that the network receives; by default as published, see features.FAMILIES.
      dtype: compute dtype; the parameters are float32.

    Returns:
      (features.Encoder, parameters as a nested dict of numpy arrays).

    Raises:
      FileNotFoundError: if the folder or one of its files cannot be had.
      ValueError: for another kind of model, weights that do not fit config.json, or an image_size that does not divide.
    """
    architecture, _, params = _read(path)
    encoder = features.make_encoder(architecture, resolution, image_size=image_size, dtype=dtype)
    if "pos_embed" in params:
        resampled = features.resample_positions(params["pos_embed"], encoder.grid, encoder.module.num_class_tokens)
        params["pos_embed"] = np.asarray(resampled)
    return dataclasses.replace(encoder, name=str(path)), params


def read_encoder(path):
    """Encoder from its published files, as they hold it: on the grid that its positions are for.

    Args:
      path: as load_encoder's.

    Returns:
      (VisionTransformer computing in float32, parameters as a nested dict of float32 numpy arrays).

    Raises:
      FileNotFoundError: if the folder or one of its files cannot be had.
      ValueError: for another kind of model, or weights that do not fit config.json.
    """
    return _read(path)[1:]


def _read(path):
    """(architecture as features.make_encoder takes it, VisionTransformer on the stored grid, its parameters)."""
    local = locate.resolve(path)
    if local.is_dir():
        format, config = format_of(local)
        architecture, side = _from_config(format, config, f"{local}/config.json")
        state_dict = _renamed(weights.read_state_dict(local), format, local)
    else:
        format = MOCOV3
        state_dict = _renamed(weights.read_state_dict(local), format, local)
        architecture, side = _from_mocov3(state_dict, local)
    try:
        encoder = _stored_encoder(architecture, side)
        target = jax.eval_shape(functools.partial(features.init_params, encoder), jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"{local}: {error}") from error
    return architecture, encoder.module, to_flax(encoder_table(encoder.module, format), state_dict, target, source=str(local))


def _stored_encoder(architecture, side):
    """features.Encoder on a grid of side * side tokens."""
    size = side * architecture["patch_size"]
    return features.make_encoder(architecture, size, image_size=size)


def format_of(folder):
    """What kind of encoder a Hugging Face folder holds.

    Args:
      folder: local folder.

    Returns:
      (Format, the part of config.json that describes the vision transformer).

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if it is damaged, or of another kind.
    """
    config = weights.read_config(folder)
    model_type = config.get("model_type")
    if model_type in VISION_PARTS:
        model_type, config = VISION_PARTS[model_type], config.get("vision_config") or {}
    if model_type not in FORMATS:
        raise ValueError(
            f"{folder}/config.json has model_type {model_type!r}; allowed: {', '.join([*FORMATS, *VISION_PARTS])}"
        )
    return FORMATS[model_type], config


def _renamed(state_dict, format, source):
    """The state dict under the names of the format's table."""
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
    """(architecture as features.make_encoder takes it, side of the position table)."""
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
    fields = {
        "family": format.family,
        "patch_size": number("patch_size"),
        "hidden_size": number("hidden_size"),
        "depth": number("num_hidden_layers"),
        "num_heads": number("num_attention_heads"),
        "activation": SWIGLU if gated else format.activations[config["hidden_act"]],
        "norm_eps": number("layer_norm_eps", 0),
    }
    if "intermediate_size" in format.config:
        fields["mlp_dim"] = number("intermediate_size")
    else:
        fields["mlp_dim"] = _dinov2_mlp_dim(fields["hidden_size"], number("mlp_ratio"), gated)
    if "num_register_tokens" in format.config:
        fields["num_registers"] = number("num_register_tokens", 0)
    if "rope_theta" in format.config:
        fields["rope_theta"] = float(number("rope_theta"))
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
    """As `_from_config`, from the sizes of the weights."""

    def shape(name, rank):
        found = np.shape(state_dict[name]) if name in state_dict else None
        if found is None or len(found) != rank:
            raise ValueError(
                f"{source} is no MoCo v3 checkpoint of a vision transformer: {name} has shape {found}, needed are {rank} axes; "
                "of other encoders, give the folder with config.json"
            )
        return found

    hidden_size, _, patch_size, _ = shape("patch_embed.proj.weight", 4)
    positions = shape("pos_embed", 3)[1]
    if hidden_size not in MOCOV3_HEADS:
        raise ValueError(f"{source} has width {hidden_size}; allowed: {', '.join(map(str, MOCOV3_HEADS))} (MoCo v3's S, B, L)")
    side = math.isqrt(max(positions - 1, 0))
    if positions != 1 + side**2:
        raise ValueError(f"{source} has {positions} positions in pos_embed; allowed: 1 + a square number")
    blocks = [int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name))]
    fields = {
        "family": MOCOV3.family,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": 1 + max(blocks, default=0),
        "num_heads": MOCOV3_HEADS[hidden_size],
        "mlp_dim": shape("blocks.0.mlp.fc1.weight", 2)[0],
    }
    return fields, side


def save_encoder(folder, module, params, *, overwrite=False):
    """Writes a folder that `load_encoder` and transformers' from_pretrained read, of the first model_type that fits.

    MoCo v3 becomes a 'vit', and NaFlex a 'siglip_vision_model' of its grid's size.

    Args:
      folder: local, or an address such as gs://bucket/folder; created if absent.
      module: the VisionTransformer.
      params: its parameters.
      overwrite: replace files that exist.

    Raises:
      FileExistsError: if the folder holds an encoder and `overwrite` is False.
      ValueError: if the parameters do not fit the module, or no config.json can express it.
    """
    format, config = _config_of(module)
    state_dict = to_torch(encoder_table(module, format), params)
    folder = epath.Path(folder)
    files = folder / "model.safetensors", folder / "config.json"
    if not overwrite:
        files.check_absent(*files)
    folder.mkdir(parents=True, exist_ok=True)
    # config.json last: a folder without it is not taken for an encoder. transformers asks for the format.
    writes = weights.safetensors_writer(state_dict, files[0], {"format": "pt"}), files.json_writer(config, files[1])
    files.write_all(dict(zip(files, writes)), overwrite=overwrite)


def _config_of(module):
    """(Format, config.json) of the first format whose config.json is read as this very module."""
    rows, columns = module.grid
    for model_type, format in FORMATS.items():
        gated = module.activation == SWIGLU
        acts = [theirs for theirs, ours in format.activations.items() if ours == module.activation]
        if format.gate is not None and gated:
            acts = [format.gate[1]]
        ratios = (ratio for ratio in range(1, 33) if _dinov2_mlp_dim(module.hidden_size, ratio, gated) == module.mlp_dim)
        values = {
            "num_channels": 3,
            "patch_size": module.patch_size,
            "image_size": rows * module.patch_size,
            "num_patches": rows * columns,
            "hidden_size": module.hidden_size,
            "num_hidden_layers": module.depth,
            "num_attention_heads": module.num_heads,
            "intermediate_size": module.mlp_dim,
            "mlp_ratio": next(ratios, None),
            "hidden_act": acts[0] if acts else None,
            "layer_norm_eps": module.norm_eps,
            "num_register_tokens": module.num_registers,
            "rope_theta": module.rope_theta,
            "mlp_bias": True,
            **{key: not set(names) & set(module.no_bias) for key, names in format.biases.items()},
        }
        if format.gate is not None:
            values[format.gate[0]] = gated
        config = {key: values[key] for key in format.config}
        try:
            architecture, side = _from_config(format, config, model_type)
        except ValueError:
            continue
        if _stored_encoder(architecture, side).module == module.clone(dtype=jnp.float32):
            return format, {"architectures": [format.model_class], "model_type": model_type, **config, **format.extra}
    raise ValueError(
        f"no config.json of {', '.join(FORMATS)} can express {module}; all know square grids only, and DINOv2's an mlp_dim "
        "that is a whole multiple of hidden_size"
    )
