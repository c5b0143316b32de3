"""VAE files of every layout: reading them, and writing those that diffusers and the published code load."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from checkpoints_tools import locate, mapping, rae, torch_param_order, vae_layouts, vae_stats, vtp, weights
from checkpoints_tools.mapping import StateDict, Tree
from checkpoints_tools.vae_layouts import DIFFUSERS, NORM_GROUPS, SIZES, abstract_params, vae_table, without_projection
from repae_jax import files
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.rae import RepresentationAutoencoder
from repae_jax.models.sit import SiT
from repae_jax.models.vae_families import VaeModule
from repae_jax.models.vtp import VisualTokenizer

_WEIGHTS, _CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
DISCRIMINATOR = "discriminator.safetensors"  # beside them in a folder that we write


class LoadedVAE(NamedTuple):
    """A VAE as read from a file, a folder, or a checkpoint."""

    module: VaeModule  # the network, of the file's sizes
    params: Tree  # float32
    latent_stats: vae_stats.Stats | None  # statistics of un-normalized latents; None if unknown
    layout: str | None = None  # of a file or folder: 'compvis', 'diffusers', 'diffusers of 2022', "diffusers' RAE", 'VTP'
    discriminator: StateDict | None = None  # published state dict, if a checkpoint holds one
    steps: int | None = None  # training steps done, if a checkpoint says so


def load_vae(path: str | Path, dtype: Any = jnp.float32, remat: bool = False) -> LoadedVAE:
    """Returns a VAE with all that its file says.

    The path, which `locate.resolve` takes, is one of
      a file with CompVis names: REPA-E's, VA-VAE's, the original SD-VAE's, FLUX's ae.safetensors; or a whole Stable Diffusion
      file, in which the VAE's names begin with `first_stage_model.`. Statistics are those of the neighbor
      NAME-latents-stats.pt or .safetensors, if there is one;
      a folder of diffusers' AutoencoderKL, or of a pipeline with such a folder in it, `vae`; or the weight file therein.
      Statistics are `latents_mean` and `latents_std`, else `scaling_factor` and `shift_factor`;
      a folder of diffusers' AutoencoderRAE, whose statistics are among its parameters: those of its latents are 0 and 1;
      a folder of VTP, with statistics as of the first.

    Dtype and remat are the module's. Parameters are float32 whatever the file holds: float16 and bfloat16 are widened, exactly,
    so that a file written from them is twice as large.
    """
    return read_file(locate.resolve(path), dtype=dtype, remat=remat)


def read_file(path: Path, state_dict: StateDict | None = None, **fields: Any) -> LoadedVAE:
    """Loads a VAE from a local file or folder, whose arrays may have been read already; see `load_vae`."""
    loaded, config, file = _read(path, state_dict, **fields)
    if isinstance(loaded.module, RepresentationAutoencoder):
        known = rae.has_statistics(loaded.params)
        return loaded._replace(latent_stats=rae.latent_stats(config, file.parent / _CONFIG) if known else None)
    channels = loaded.module.latent_channels
    if config is not None and not isinstance(loaded.module, VisualTokenizer):
        return loaded._replace(latent_stats=vae_stats.from_config(config, file.parent / _CONFIG, channels))
    for beside in _stats_beside(file):
        if beside.exists():
            return loaded._replace(latent_stats=vae_stats.from_arrays(weights.read_file(beside), beside, channels))
    return loaded


def from_state_dict(state_dict: StateDict, source: str, norm_groups: int = NORM_GROUPS) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Returns module and parameters from a state dict, such as that of a training checkpoint."""
    names, state_dict = vae_layouts.detect_layout(state_dict, source)
    module = vae_layouts.infer_module(state_dict, names, source, norm_groups)
    return module, mapping.to_flax(vae_table(module, names), state_dict, abstract_params(module), source=source)


def read_vae_params(path: str | Path, module: VaeModule) -> Tree:
    """Returns parameters for a network that is already described; ValueError if the file's is another.

    They are without 'vf_projection' if the file has no such map from latents to tokens of module.feature_dim, which then has
    to start afresh.
    """
    # no shape implies the groups, so that only a config.json can contradict the module's
    stored, _, _ = _read(locate.resolve(path), norm_groups=getattr(module, "norm_groups", NORM_GROUPS))
    if type(stored.module) is not type(module):
        kinds = (type(vae).__name__ for vae in (stored.module, module))
        raise ValueError("{} holds an {}, config.vae describes an {}: correct one of the two".format(path, *kinds))
    in_file, here = vae_sizes(stored.module), vae_sizes(module)
    differences = [f"{name}: {in_file[name]} in the file, {here[name]} here" for name in here if in_file[name] != here[name]]
    if differences:
        raise ValueError(f"{path} holds another VAE than the one described\n  " + "\n  ".join(differences))
    needed, width = module.feature_dim, stored.module.feature_dim
    if needed == width:
        return stored.params
    if needed is not None:
        message = "the map from latents to tokens of width %s starts afresh: that of %s is of width %s"
        logging.warning(message, needed, path, width)
    return without_projection(module, stored.params)[1]


def read_latent_stats(path: str | Path) -> dict[str, np.ndarray]:
    """Returns latent statistics by themselves, {'mean', 'var'}, float32 [C]; raises as `vae_stats.from_arrays`.

    The path, which `locate.resolve` takes, is REPA-E's NAME-latents-stats.pt, LightningDiT's latents_stats.pt, the same as
    .safetensors, or a folder: of diffusers, or VTP's with such a file beside the weights.
    """
    path = locate.resolve(path)
    if not path.is_dir():
        return vae_stats.from_arrays(weights.read_file(path), path)
    config = _read_config(path)
    if config.get("_class_name") == rae.CLASS:
        return rae.latent_stats(config, path / _CONFIG)
    if config.get("model_type") == vtp.MODEL_TYPE:
        beside = next((file for file in _stats_beside(weights.weight_file(path)) if file.exists()), None)
        if beside is None:
            raise ValueError(f"{path} has no statistics: give VTP's latents_stats.pt, or let them be measured")
        return vae_stats.from_arrays(weights.read_file(beside), beside)
    stats = vae_stats.from_config(config, path / _CONFIG)
    if stats is None:
        raise ValueError(f"{path / _CONFIG} has neither latents_mean and latents_std nor scaling_factor")
    return stats


def with_latent_stats(loaded: LoadedVAE, path: str | Path) -> LoadedVAE:
    """Returns a VAE with the statistics of a file, as `read_latent_stats` takes it; of an RAE, of the published stat.pt."""
    if not isinstance(loaded.module, RepresentationAutoencoder):
        return loaded._replace(latent_stats=read_latent_stats(path))
    path = locate.resolve(path)
    return loaded._replace(params=rae.with_statistics(loaded.params, weights.read_file(path), path))


def save_diffusers(
    folder: str | Path, module: VaeModule, params: Tree, latent_stats: vae_stats.Stats | None,
    discriminator: StateDict | None = None, *, overwrite: bool = False,
) -> list[Path]:
    """Writes a folder that `diffusers.AutoencoderKL.from_pretrained` loads; returns the paths written, the VAE's first.

    An RAE becomes diffusers' AutoencoderRAE, which has no place for other statistics than its own, nor for a discriminator;
    VTP's becomes a folder of its own kind, with statistics, if there are any, in a file beside the weights.
    Statistics become entries of config.json, see `vae_stats.to_config`; the discriminator is written beside the model as
    discriminator.safetensors; a map from latents to tokens is left out. Raises as `files.write_all`, and ValueError if the
    parameters are not the module's, the statistics missing or not its latents', or diffusers cannot express the network.
    """
    if isinstance(module, RepresentationAutoencoder):
        if latent_stats is not None and (np.any(latent_stats["mean"]) or np.any(latent_stats["var"] != 1)):
            logging.warning("%s: the statistics of the RAE's latents that the run has besides are left out", folder)
        return rae.save(folder, module, params, overwrite=overwrite)
    if isinstance(module, VisualTokenizer):
        stats = latent_stats and vae_stats.to_arrays(latent_stats, module.latent_channels)
        return vtp.save(folder, module, params, stats, overwrite=overwrite)
    if latent_stats is None:
        raise ValueError(
            f"{folder}: latent statistics are missing, without which diffusers would take those of Stable Diffusion. Give a "
            "file of them (--latent_stats), or put it beside the weights NAME.pt as NAME-latents-stats.pt or .safetensors; it "
            "holds latents_scale (1 / std) and latents_bias (mean), or mean and std"
        )
    stats = vae_stats.to_config(latent_stats, module.latent_channels)
    module, params = without_projection(module, params)
    config = diffusers_config(module) | stats
    state_dict = mapping.to_torch(vae_table(module, DIFFUSERS), params)
    weights_file, config_file, discriminator_file = (epath.Path(folder) / name for name in (_WEIGHTS, _CONFIG, DISCRIMINATOR))
    writes = {weights_file: weights.safetensors_writer(state_dict, weights_file, {"format": "pt"})}
    if discriminator is not None:
        writes[discriminator_file] = weights.safetensors_writer(dict(discriminator), discriminator_file)
    elif discriminator_file.exists():
        raise FileExistsError(f"{discriminator_file} is of the VAE that would be replaced; remove it, or choose another folder")
    writes[config_file] = files.json_writer(config, config_file)  # last: a folder that has one is complete
    return weights.write_files(writes, overwrite=overwrite)


def save_published(
    stem: str | Path, module: VaeModule, params: Tree, latent_stats: vae_stats.Stats | None,
    discriminator: StateDict | None = None, *, overwrite: bool = False,
) -> list[Path]:
    """Writes NAME.pt, NAME-latents-stats.pt and NAME-discriminator-ckpt.pt, as REPA-E does; returns the paths.

    `stem` is the path of NAME; `.safetensors` at its end (or `.pt`, the default) says the kind of all files. Without statistics
    or discriminator, their files are left out. Raises as `files.write_all`, and FileExistsError if there are no statistics to
    write but those of the VAE that would be replaced would stay beside the new one. Reference: REPA-E `save_vae_weights.py`.
    """
    if not isinstance(module, AutoencoderKL):
        raise ValueError(f"{stem}: RAE and VTP are written as folders alone; give a name without an ending")
    if module.norm_groups != NORM_GROUPS:
        layout = f"this layout, whose readers take {NORM_GROUPS}"
        raise ValueError(f"norm_groups={module.norm_groups} cannot be told by {layout}: write a diffusers folder")
    contents = {"": torch_param_order.to_ordered_torch(vae_table(module), params)}
    if latent_stats is not None:
        contents["-latents-stats"] = vae_stats.to_arrays(latent_stats, module.latent_channels)
    if discriminator is not None:
        contents["-discriminator-ckpt"] = dict(discriminator)
    stem = epath.Path(stem)
    suffix = stem.suffix if stem.suffix in (".pt", ".safetensors") else ".pt"
    by_path = {stem.parent / f"{stem.name.removesuffix(suffix)}{part}{suffix}": content for part, content in contents.items()}
    vae_file = next(iter(by_path))
    stale = [str(path) for path in _stats_beside(vae_file) if path.exists()]
    if overwrite and latent_stats is None and stale and vae_file.exists():
        raise FileExistsError(f"{', '.join(stale)} is of the VAE that would be replaced; remove it, or choose another name")
    return weights.write_files({path: weights.writer(content, path) for path, content in by_path.items()}, overwrite=overwrite)


def _stats_beside(file):
    """Possible paths of a weight file's statistics; first with its own ending, as `save_published` writes them."""
    suffixes = sorted((".pt", ".safetensors"), key=lambda suffix: suffix != file.suffix)
    return [file.parent / f"{file.stem}-latents-stats{suffix}" for suffix in suffixes]


def _read(path, state_dict=None, norm_groups=NORM_GROUPS, **fields):
    """(VAE without its statistics, the config.json beside the file or None, the file)."""
    if path.is_dir():
        _read_config(path)  # before the weights: the class may be unknown
    file = weights.weight_file(path)
    state_dict = weights.read_file(file) if state_dict is None else state_dict
    if rae.is_rae(state_dict):
        config = _read_config(file.parent, rae.CLASS)
        module, params = rae.read(state_dict, config, path, **fields)
        return LoadedVAE(module, params, None, "diffusers' RAE"), config, file
    if vtp.is_vtp(state_dict):
        config = _read_config(file.parent, vtp.MODEL_TYPE)
        module, params = vtp.read(state_dict, config, path, **fields)
        return LoadedVAE(module, params, None, "VTP"), config, file
    names, state_dict = vae_layouts.detect_layout(state_dict, path)
    config = None
    if path.is_dir() or (names.layout.startswith("diffusers") and (file.parent / _CONFIG).exists()):
        config = _read_config(file.parent, "AutoencoderKL")
        norm_groups = config.get("norm_num_groups", NORM_GROUPS)
        if not isinstance(norm_groups, int) or norm_groups < 1:
            raise ValueError(f"{file.parent / _CONFIG}: norm_num_groups is {norm_groups!r}, no positive number")
    module = vae_layouts.infer_module(state_dict, names, path, norm_groups, **fields)
    if differences := [
        f"{name}: {config[name]} in {_CONFIG}, {value} by the weights or as all that is supported"
        for name, value in (diffusers_config(module) if config is not None else {}).items()
        if name in config and config[name] != value
    ]:
        raise ValueError(f"{file.parent / _CONFIG} does not fit the weights beside it\n  " + "\n  ".join(differences))
    params = mapping.to_flax(vae_table(module, names), state_dict, abstract_params(module), source=str(path))
    return LoadedVAE(module, params, None, names.layout), config, file


def _read_config(folder, *classes):
    config, classes = files.read_json(Path(folder) / _CONFIG), classes or ("AutoencoderKL", rae.CLASS, vtp.MODEL_TYPE)
    kind = config.get("_class_name", config.get("model_type"))
    if kind not in classes:
        found = f"of class {kind!r}"
        raise ValueError(f"{Path(folder) / _CONFIG} is {found}; allowed here: {', '.join(map(repr, classes))}")
    return config


def diffusers_config(module: AutoencoderKL) -> dict[str, Any]:
    """Returns the arguments of diffusers' AutoencoderKL that describe the network; ValueError if there are none."""
    if module.channel_multipliers[0] != 1:
        theirs = "diffusers' first level is as wide as conv_in, multiplier 1"
        raise ValueError(f"channel_multipliers={module.channel_multipliers}: {theirs}")
    levels = range(len(module.channel_multipliers))

    def blocks(name):
        return [f"Attn{name}" if level in module.attention_levels else name for level in levels]

    return {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": module.latent_channels,
        "block_out_channels": [module.channels * multiplier for multiplier in module.channel_multipliers],
        "layers_per_block": module.num_res_blocks,
        "down_block_types": blocks("DownEncoderBlock2D"), "up_block_types": blocks("UpDecoderBlock2D")[::-1],
        "act_fn": "silu", "norm_num_groups": module.norm_groups,
        "use_quant_conv": module.quant_convs, "use_post_quant_conv": module.quant_convs, "mid_block_add_attention": True,
    }


def stats_for_sit(
    sit: SiT, sit_stats: vae_stats.Stats | None, module: VaeModule, stats: vae_stats.Stats | None, source: str
) -> vae_stats.Stats:
    """Returns the statistics that a published SiT's latents are normalized by: its own or, if it has none, its VAE's.

    ValueError, with the SiT's source, if there are none, or the VAE has another number of channels.
    """
    if module.latent_channels != sit.latent_channels:
        raise ValueError(f"the VAE has {module.latent_channels} latent channels, the SiT of {source} {sit.latent_channels}")
    known = sit_stats or stats
    if not known:
        remedy = "give --vae as diffusers' folder, whose config.json tells the statistics of its latents"
        raise ValueError(f"{source} has no latent batch norm, as REPA and DiT have none: {remedy}")
    return known


def vae_sizes(module: VaeModule) -> dict[str, Any]:
    """Returns the fields that describe the network, in a form that compares."""
    if not isinstance(module, AutoencoderKL):
        others = ("remat", "dtype", "parent", "name")
        return {name: getattr(module, name) for name in module.__dataclass_fields__ if name not in others}
    sizes = {name: getattr(module, name) for name in SIZES}
    multipliers, levels = tuple(module.channel_multipliers), tuple(sorted(module.attention_levels))
    return sizes | {"channel_multipliers": multipliers, "attention_levels": levels}
