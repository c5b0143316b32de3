"""Representation autoencoders: folders of diffusers' AutoencoderRAE <-> our module."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from etils import epath

from checkpoints_tools import mapping, weights
from checkpoints_tools.mapping import Entry, Layout, StateDict, Table, Tree, linear, norm
from checkpoints_tools.vit import encoder_table
from checkpoints_tools.vit_formats import FORMATS
from repae_jax import files
from repae_jax.models.encoders import IMAGENET_MEAN, IMAGENET_STD
from repae_jax.models.rae import STD_EPSILON, RepresentationAutoencoder, encoder_of

CLASS = "AutoencoderRAE"
SIGNATURE = "decoder.decoder_embed."  # prefix of a name that only its files have
_HEAD = 64  # channels of an encoder's head, in all of diffusers' RAEs
_TABLE = 37  # side of DINOv2's table of positions, likewise
_POSITIONS = Layout(lambda x: x.transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1))  # [C, h, w] <-> [h, w, C]
_STATS = {"_latents_mean": "latent_norm/mean", "_latents_std": "latent_norm/std"}
# key of config.json -> (field, diffusers' default)
_FIELDS = {
    "encoder_hidden_size": ("latent_channels", 768),
    "encoder_patch_size": ("encoder_patch_size", 14),
    "encoder_num_hidden_layers": ("encoder_depth", 12),
    "decoder_hidden_size": ("decoder_hidden_size", 512),
    "decoder_num_hidden_layers": ("decoder_depth", 8),
    "decoder_num_attention_heads": ("decoder_heads", 16),
    "decoder_intermediate_size": ("decoder_mlp_dim", 2048),
    "patch_size": ("patch_size", 16),
}
# what else config.json may say, and all that is known of it here
_FIXED = {
    "encoder_type": ("dinov2",), "num_channels": (3,), "scaling_factor": (1, 1.0), "reshape_to_2d": (True,),
    "encoder_norm_mean": (None, [*IMAGENET_MEAN]), "encoder_norm_std": (None, [*IMAGENET_STD]),
}  # fmt: skip
# transformers 5's names of the encoder's attention -> those of the released files, which were written with transformers 4
RENAMED = {
    ".attention.q_proj.": ".attention.attention.query.", ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.", ".attention.o_proj.": ".attention.output.dense.",
}  # fmt: skip


def rae_table(module: RepresentationAutoencoder) -> Table:
    """Returns the table between the names of the released files and the parameters."""
    encoder = encoder_table(encoder_of(module), FORMATS["dinov2_with_registers"])
    entries = [
        Entry(tuple(f"encoder.{name}" for name in entry.torch), tuple(map(_path, entry.flax)), entry.layout, entry.stacked)
        for entry in encoder.entries
    ]
    entries += [Entry((theirs,), (ours,), _POSITIONS) for theirs, ours in _STATS.items()]
    entries += linear("decoder.decoder_embed", "decoder/embed") + norm("decoder.decoder_norm", "decoder/norm")
    entries += linear("decoder.decoder_pred", "decoder/to_pixels")
    entries.append(Entry(("decoder.trainable_cls_token",), ("decoder/cls_token",)))
    entries += mapping.stack(_decoder_block(), {"blocks": range(module.decoder_depth)})
    constants = {f"encoder.{name}": value for name, value in encoder.constants.items() if not name.startswith("layernorm.")}
    pixels = {"encoder_mean": IMAGENET_MEAN, "encoder_std": IMAGENET_STD}
    constants |= {name: np.asarray(value, np.float32).reshape(1, 3, 1, 1) for name, value in pixels.items()}
    return Table(entries, constants, ignored=("decoder.decoder_pos_embed",), checked=tuple(pixels))


def _path(path):
    """Path of one of the encoder's parameters here; the table of positions, on the stored grid, is not the encoder's own."""
    return "encoder_positions" if path == "pos_embed" else f"encoder/{path}"


def _decoder_block():
    torch, flax = "decoder.decoder_layers.{i}", "decoder/{stack}"
    entries = norm(f"{torch}.layernorm_before", f"{flax}/norm1") + norm(f"{torch}.layernorm_after", f"{flax}/norm2")
    for theirs, ours in (
        ("attention.to_q", "attn/query"), ("attention.to_k", "attn/key"), ("attention.to_v", "attn/value"),
        ("attention.to_out.0", "attn/out"), ("intermediate.dense", "mlp/fc1"), ("output.dense", "mlp/fc2"),
    ):  # fmt: skip
        entries += linear(f"{torch}.{theirs}", f"{flax}/{ours}")
    return entries


def abstract_params(module: RepresentationAutoencoder) -> dict[str, Any]:
    """Returns shapes and dtypes of the parameters."""
    side = module.grid * module.patch_size
    inputs = (1, side, side, 3), (1, module.grid, module.grid, module.latent_channels)
    return mapping.abstract_variables(module, *inputs)["params"]


def is_rae(state_dict: StateDict) -> bool:
    """Returns True if the names are those of an RAE."""
    return any(name.startswith(SIGNATURE) for name in state_dict)


def read(
    state_dict: StateDict, config: Mapping[str, Any], source: Path, **fields: Any
) -> tuple[RepresentationAutoencoder, Tree]:
    """Returns the module and its parameters from the content of a diffusers folder; ValueError for what is not known here."""
    module = _module(config, source, **fields)
    renamed = _with_full_statistics({_replaced(name, RENAMED): array for name, array in state_dict.items()}, module, source)
    return module, mapping.to_flax(rae_table(module), renamed, abstract_params(module), source=str(source))


def to_transformers_5(name: str) -> str:
    """Returns a released file's name as diffusers has it with transformers 5."""
    return _replaced(name, {old: new for new, old in RENAMED.items()})


def _replaced(name, renames):
    for old, new in renames.items() if name.startswith("encoder.") else ():
        name = name.replace(old, new)
    return name


def _module(config, source, **fields):
    for key, allowed in _FIXED.items():
        if key in config and config[key] not in allowed:
            raise ValueError(f"{source} has {key} {config[key]!r}; allowed: {', '.join(map(repr, allowed))}")
    sizes = {ours: config.get(theirs, default) for theirs, (ours, default) in _FIELDS.items()}
    seen = config.get("encoder_input_size", 224)
    for name, value in {**sizes, "encoder_input_size": seen}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{source} has {name} {value!r}; allowed: a positive number")
    if seen % sizes["encoder_patch_size"] or sizes["latent_channels"] % _HEAD:
        raise ValueError(
            f"{source} has encoder_input_size {seen} and encoder_hidden_size {sizes['latent_channels']}; allowed: multiples of "
            f"encoder_patch_size {sizes['encoder_patch_size']} and of {_HEAD}"
        )
    grid, heads = seen // sizes["encoder_patch_size"], sizes["latent_channels"] // _HEAD
    return RepresentationAutoencoder(**sizes, grid=grid, encoder_heads=heads, encoder_table=_TABLE, **fields)


def _with_full_statistics(state_dict, module, source):
    """State dict whose statistics have an entry for each channel and position; files may have one for all, or per channel."""
    full = (module.latent_channels, module.grid, module.grid)
    arrays = {name: _broadcast(state_dict[name], full, source, name) for name in _STATS if name in state_dict}
    return {**state_dict, **arrays}


def _broadcast(array, full, source, name):
    array = np.asarray(array)
    array = array.reshape(-1, 1, 1) if array.ndim == 1 else array
    try:
        return np.broadcast_to(array.reshape(array.shape[-3:]), full)
    except ValueError:
        raise ValueError(f"{source}: {name} has shape {array.shape}; allowed: {full}, or one that broadcasts to it") from None


def with_statistics(params: Tree, arrays: StateDict, source: str | Path) -> Tree:
    """Returns parameters that normalize by the statistics of a published file, stat.pt: `mean` and `var`, [C, h, w] or [C].

    The published code divides by sqrt(var + 1e-5), so that the standard deviation kept is that without diffusers' 1e-5.
    """
    if set(arrays) != {"mean", "var"}:
        raise ValueError(f"{source} holds {', '.join(sorted(arrays)[:8])}; the statistics of an RAE are mean and var")
    height, width, channels = params["latent_norm"]["mean"].shape
    full = (channels, height, width)
    mean, var = (_broadcast(arrays[name], full, source, name).astype(np.float64) for name in ("mean", "var"))
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
        raise ValueError(f"{source}: mean and var must be finite, and var not negative")
    std = np.sqrt(var + STD_EPSILON) - STD_EPSILON
    stats = {"mean": rearrange(mean, "c h w -> h w c"), "std": rearrange(std, "c h w -> h w c")}
    return {**params, "latent_norm": {name: array.astype(np.float32) for name, array in stats.items()}}


def has_statistics(params: Tree) -> bool:
    """Returns False if the latents are as the encoder gives them, with a mean of 0 and a standard deviation of 1 on file."""
    return bool(np.any(params["latent_norm"]["mean"]) or np.any(params["latent_norm"]["std"] != 1))


def latent_stats(config: Mapping[str, Any], source: str | Path) -> dict[str, np.ndarray]:
    """Returns the mean 0 and the variance 1 that latents have because the RAE normalizes them by statistics of its own.

    ValueError if its config.json has none.
    """
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        advice = "let them be measured (config.init.latent_stats=''), or add those of a stat.pt: convert --latent_stats"
        raise ValueError(f"{source} has no latents_mean and latents_std: the RAE's latents are not normalized; {advice}")
    channels = config.get("encoder_hidden_size", 768)
    return {"mean": np.zeros(channels, np.float32), "var": np.ones(channels, np.float32)}


def config_of(module: RepresentationAutoencoder, params: Tree) -> dict[str, Any]:
    """Returns the config.json of diffusers' AutoencoderRAE; ValueError if it has none for the encoder."""
    if (module.encoder_heads * _HEAD, module.encoder_table) != (module.latent_channels, _TABLE):
        theirs = f"its encoders have heads of {_HEAD} channels and {_TABLE} x {_TABLE} positions"
        raise ValueError(f"diffusers' AutoencoderRAE cannot express {module.encoder_heads} heads of an encoder {theirs}")
    stats = {f"latents_{name}": None for name in ("mean", "std")}
    if has_statistics(params):
        stats = {name: _POSITIONS.to_torch(np.asarray(params["latent_norm"][name[8:]])).tolist() for name in stats}
    return {
        "_class_name": CLASS, "encoder_type": "dinov2", "encoder_input_size": module.grid * module.encoder_patch_size,
        **{theirs: getattr(module, ours) for theirs, (ours, _) in _FIELDS.items()}, **stats,
    }  # fmt: skip


def state_dict_of(module: RepresentationAutoencoder, params: Tree) -> dict[str, np.ndarray]:
    """Returns the arrays of a released file; statistics that are 0 and 1 are one number each, as diffusers has them then."""
    state_dict = mapping.to_torch(rae_table(module), params)
    if not has_statistics(params):
        state_dict |= {name: state_dict[name].reshape(-1)[:1] for name in _STATS}
    return state_dict


def save(folder: str | Path, module: RepresentationAutoencoder, params: Tree, *, overwrite: bool = False) -> list[Any]:
    """Writes a folder that `diffusers.AutoencoderRAE.from_pretrained` reads, under the names of the released ones."""
    weights_file, config_file = (epath.Path(folder) / name for name in ("diffusion_pytorch_model.safetensors", "config.json"))
    writes = {weights_file: weights.safetensors_writer(state_dict_of(module, params), weights_file, {"format": "pt"})}
    writes[config_file] = files.json_writer(config_of(module, params), config_file)  # last: with it the folder is complete
    return weights.write_files(writes, overwrite=overwrite)
