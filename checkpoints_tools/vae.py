"""VAE files of every layout: reading them, and writing what diffusers and the published code load."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from checkpoints_tools import locate, mapping, torch_param_order, weights
from checkpoints_tools.vae_layouts import detect_layout, diffusers_table, infer_module, vae_table, without_projection
from repae_jax import files
from repae_jax.models.autoencoder import AutoencoderKL

_GROUPS = 32  # of every published network; only diffusers' config.json can say otherwise
_SCALING = 0.18215  # what diffusers takes for a config.json without scaling_factor, such as sd-vae-ft-mse's
_WEIGHTS, _CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
DISCRIMINATOR = "discriminator.safetensors"  # beside them in a folder that we write


@dataclass(frozen=True)
class LoadedVAE:
    """A VAE as read from a file or folder.

    Attributes:
      module: the network, of the file's sizes.
      params: its parameters, nested dict of float32 numpy arrays.
      latent_stats: {'mean', 'var'}, float32 [C], of un-normalised latents; None if nothing there tells them.
      layout: 'compvis', 'diffusers' or 'diffusers of 2022'.
    """

    module: AutoencoderKL
    params: Mapping[str, Any]
    latent_stats: Mapping[str, np.ndarray] | None
    layout: str


def load_vae(path, dtype=jnp.float32, remat=False):
    """A VAE with all that its file says.

    Args:
      path: what `locate.resolve` takes, being one of
        a file with CompVis names: REPA-E's, VA-VAE's, the original SD-VAE's, FLUX's ae.safetensors; or a whole
        Stable Diffusion file, in which the VAE's names begin with `first_stage_model.`. Statistics are those of the
        neighbour NAME-latents-stats.pt or .safetensors, if there is one;
        a folder of diffusers' AutoencoderKL, or of a pipeline with such a folder in it, `vae`; or the weight file therein.
        Statistics are `latents_mean` and `latents_std`, else `scaling_factor` and `shift_factor`.
      dtype: compute dtype of the module.
      remat: the module's.

    Returns:
      LoadedVAE. Its parameters are float32 whatever the file holds: float16 and bfloat16 are widened, exactly, so that a file
      written from them is twice as large.

    Raises:
      FileNotFoundError: if there is no such thing.
      ValueError: for another kind of network, an unknown layout, or anything missing, unexpected, of a wrong shape or dtype, or
        not finite; the message lists all of it.
    """
    state_dict, names, module, config, file = _read(path, dtype=dtype, remat=remat)
    table = vae_table(module, names)
    params = mapping.to_flax(table, state_dict, abstract_params(module), source=str(path))
    channels = module.latent_channels
    if config is not None:
        stats = _config_stats(config, file.parent / _CONFIG, channels)
    else:
        beside = next((candidate for candidate in _stats_beside(file) if candidate.exists()), None)
        stats = latent_stats_from_arrays(weights.read_state_dict(beside), beside, channels) if beside else None
    return LoadedVAE(module, params, stats, names.layout)


def _stats_beside(file):
    """Where the statistics of a weight file may lie; first with its own ending, as `save_published` writes them."""
    suffixes = sorted((".pt", ".safetensors"), key=lambda suffix: suffix != file.suffix)
    return [file.parent / f"{file.stem}-latents-stats{suffix}" for suffix in suffixes]


def from_state_dict(state_dict, source, norm_groups=_GROUPS):
    """`load_vae` of a state dict alone, such as the one within a training checkpoint: (module, params)."""
    names, state_dict = detect_layout(state_dict, source)
    module = infer_module(state_dict, names, source, norm_groups)
    return module, mapping.to_flax(vae_table(module, names), state_dict, abstract_params(module), source=source)


def read_vae_params(path, module, target):
    """Parameters for a network that is already described.

    Args:
      path: as `load_vae`.
      module: AutoencoderKL.
      target: its parameter tree, of arrays or ShapeDtypeStruct.

    Returns:
      Nested dict of numpy arrays with target's structure, shapes and dtypes; without 'vf_projection' if the file has no such
      map from latents to tokens of module.feature_dim, which then has to start afresh.

    Raises:
      FileNotFoundError, ValueError: as `load_vae`; also if the file's network is another than `module`.
    """
    # no shape tells the groups, so that only a config.json can contradict the module's
    state_dict, names, found, _, _ = _read(path, norm_groups=module.norm_groups)
    there, here = _sizes(found), _sizes(module)
    differences = [f"{name}: {there[name]} in the file, {here[name]} here" for name in there if there[name] != here[name]]
    if differences:
        raise ValueError(f"{path} holds another VAE than the one described\n  " + "\n  ".join(differences))
    if module.feature_dim is not None and found.feature_dim != module.feature_dim:
        logging.warning(
            "the map from latents to tokens of width %s starts afresh: that of %s is of width %s", module.feature_dim, path,
            found.feature_dim,
        )  # fmt: skip
        module, target = without_projection(module, target)
    return mapping.to_flax(vae_table(module, names), state_dict, target, source=str(path))


def read_latent_stats(path):
    """Latent statistics by themselves.

    Args:
      path: REPA-E's NAME-latents-stats.pt (`latents_scale` = 1 / std, `latents_bias` = mean), LightningDiT's latents_stats.pt
        (`mean`, `std`), the same as .safetensors, all [1, C, 1, 1] or [C]; or a diffusers folder, as `load_vae`.

    Returns:
      {'mean', 'var'}, float32 [C].

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for other names or shapes, a scale that is not positive, or anything not finite.
    """
    path = locate.resolve(path)
    if not path.is_dir():
        return latent_stats_from_arrays(weights.read_state_dict(path), path)
    folder = _model_folder(path)
    stats = _config_stats(_read_config(folder), folder / _CONFIG)
    if stats is None:
        raise ValueError(f"{folder / _CONFIG} has neither latents_mean and latents_std nor scaling_factor")
    return stats


def latent_stats_from_arrays(arrays, source, channels=None):
    """`read_latent_stats` of a file's arrays.

    Args:
      arrays: name -> array.
      source: the file's name, for errors.
      channels: C, if known.

    Returns:
      {'mean', 'var'}, float32 [C].

    Raises:
      ValueError: as `read_latent_stats`.
    """
    if set(arrays) == {"latents_bias", "latents_scale"}:
        named = {name: arrays[name] for name in ("latents_bias", "latents_scale")}
        return _stats(source, channels, inverted=True, **named)
    if set(arrays) == {"mean", "std"}:
        return _stats(source, channels, mean=arrays["mean"], std=arrays["std"])
    raise ValueError(
        f"{source} holds {', '.join(sorted(arrays)[:8]) or 'nothing'}; latent statistics are latents_scale and latents_bias, "
        "or mean and std"
    )


def published_stats(latent_stats, channels=None):
    """Content of a published -latents-stats file, float32 [1, C, 1, 1], of {'mean', 'var'}; C is checked if given."""
    mean, std = _mean_and_std(latent_stats, channels)
    arrays = {"latents_scale": 1 / std, "latents_bias": mean}
    return {name: array.astype(np.float32).reshape(1, -1, 1, 1) for name, array in arrays.items()}


def abstract_params(module):
    """Parameter tree of an AutoencoderKL as ShapeDtypeStruct; nothing is computed."""
    size = 2 * module.factor
    images, noise = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 2, 2, module.latent_channels))
    return jax.eval_shape(module.init, jax.random.key(0), images, noise)["params"]


def save_diffusers(folder, module, params, latent_stats, discriminator_state_dict=None, *, overwrite=False):
    """Writes a folder that `diffusers.AutoencoderKL.from_pretrained` loads.

    Args:
      folder: made if it does not exist.
      module: AutoencoderKL.
      params: its parameters; a map from latents to tokens is left out.
      latent_stats: {'mean', 'var'}, [C]: `latents_mean` and `latents_std` of config.json, beside a `scaling_factor` of 1, for
        diffusers' pipelines multiply by both; if the same in all channels, `shift_factor` and `scaling_factor` alone.
      discriminator_state_dict: name -> numpy array, written beside the model as discriminator.safetensors, unless None.
      overwrite: replace what is there.

    Returns:
      The paths written, the VAE's first.

    Raises:
      FileExistsError: if there is such a model and `overwrite` is False; nothing is written then.
      ValueError: if the parameters are not the module's, the statistics missing or not its latents', or the network is one
        that diffusers cannot express.
      OSError: as `files.write_all`: if there is no space, what was there stays whole.
    """
    if latent_stats is None:
        raise ValueError(
            f"{folder}: latent statistics are missing, without which diffusers would take those of Stable Diffusion. Give a "
            "file of them (--latent_stats), or put it beside the weights NAME.pt as NAME-latents-stats.pt or .safetensors; it "
            "holds latents_scale (1 / std) and latents_bias (mean), or mean and std"
        )
    mean, std = _mean_and_std(latent_stats, module.latent_channels)
    module, params = without_projection(module, params)
    config = _diffusers_config(module)
    if np.ptp(mean) == np.ptp(std) == 0:
        config |= {"shift_factor": float(mean[0]), "scaling_factor": float(1 / std[0])}
    else:
        config |= {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 1.0}
    state_dict = mapping.to_torch(diffusers_table(module), params)
    folder = epath.Path(folder)
    weights_file, config_file = folder / _WEIGHTS, folder / _CONFIG
    writes = {weights_file: weights.safetensors_writer(state_dict, weights_file, {"format": "pt"})}
    file = folder / DISCRIMINATOR
    if discriminator_state_dict is None:
        if file.exists():
            raise FileExistsError(f"{file} is of the VAE that would be replaced; remove it, or choose another folder")
    else:
        writes[file] = weights.safetensors_writer(dict(discriminator_state_dict), file)
    writes[config_file] = files.json_writer(config, config_file)  # last: a folder that has one is complete
    if not overwrite:
        files.check_absent(*writes)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_all(writes, overwrite=overwrite)
    return list(writes)


def save_published(stem, module, params, latent_stats, discriminator_state_dict=None, *, overwrite=False):
    """Writes NAME.pt, NAME-latents-stats.pt and NAME-discriminator-ckpt.pt, as REPA-E's `save_vae_weights.py` does.

    Args:
      stem: path of NAME, its folder made if it does not exist; `.safetensors` at its end (or `.pt`, the default) says what
        kind all files are.
      module: AutoencoderKL.
      params: its parameters.
      latent_stats: {'mean', 'var'}, [C].
      discriminator_state_dict: name -> numpy array. Without statistics or discriminator their file is left out.
      overwrite: replace the files.

    Returns:
      The paths written, the VAE's first.

    Raises:
      FileExistsError: if one of the files exists and `overwrite` is False, or if there are no statistics to write but those
        of the VAE that would be replaced would stay beside the new one; nothing is written then.
      ValueError: if the parameters are not the module's, the statistics not its latents', or the network is one that this
        layout cannot express.
      OSError: as `files.write_all`: if there is no space, what was there stays whole.
    """
    if module.norm_groups != _GROUPS:
        raise ValueError(
            f"norm_groups={module.norm_groups} cannot be told by this layout, whose readers take {_GROUPS}: "
            "write a diffusers folder"
        )
    contents = {"": torch_param_order.to_ordered_torch(vae_table(module), params)}
    if latent_stats is not None:
        contents["-latents-stats"] = published_stats(latent_stats, module.latent_channels)
    if discriminator_state_dict is not None:
        contents["-discriminator-ckpt"] = dict(discriminator_state_dict)
    stem = epath.Path(stem)
    suffix = stem.suffix if stem.suffix in (".pt", ".safetensors") else ".pt"
    files = {stem.parent / f"{stem.name.removesuffix(suffix)}{part}{suffix}": content for part, content in contents.items()}
    if not overwrite:
        files.check_absent(*files)
    vae_file = next(iter(files))
    if latent_stats is None and vae_file.exists():
        stale = [str(path) for path in _stats_beside(vae_file) if path.exists()]
        if stale:
            raise FileExistsError(f"{', '.join(stale)} is of the VAE that would be replaced; remove it, or choose another name")
    stem.parent.mkdir(parents=True, exist_ok=True)
    writer = weights.torch_writer if suffix == ".pt" else weights.safetensors_writer
    files.write_all({path: writer(content, path) for path, content in files.items()}, overwrite=overwrite)
    return list(files)


def torch_vae(module, params):
    """diffusers' AutoencoderKL with the same weights, in eval mode. NCHW; needs torch and diffusers."""
    import diffusers
    import torch

    module, params = without_projection(module, params)
    config = {name: value for name, value in _diffusers_config(module).items() if name != "_class_name"}
    vae = diffusers.AutoencoderKL(**config)
    state_dict = mapping.to_torch(diffusers_table(module), params)
    vae.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}, strict=True)
    return vae.eval()


def _read(path, norm_groups=_GROUPS, **fields):
    """(state dict, Names, module, config.json or None, weight file) of one VAE."""
    path = locate.resolve(path)
    if path.is_dir():
        path = _model_folder(path)
        _read_config(path)  # before the weights: the class may be another
    file = weights.weight_file(path)
    names, state_dict = detect_layout(weights.read_state_dict(file), path)
    config = None
    if path.is_dir() or (names.layout.startswith("diffusers") and (file.parent / _CONFIG).exists()):
        config = _read_config(file.parent)
        norm_groups = config.get("norm_num_groups", _GROUPS)
        if not isinstance(norm_groups, int) or norm_groups < 1:
            raise ValueError(f"{file.parent / _CONFIG}: norm_num_groups is {norm_groups!r}, no positive number")
    module = infer_module(state_dict, names, path, norm_groups, **fields)
    if config is not None:
        differences = [
            f"{name}: {config[name]} in {_CONFIG}, {value} by the weights or as all that is supported"
            for name, value in _diffusers_config(module).items()
            if name in config and config[name] != value
        ]
        if differences:
            raise ValueError(f"{file.parent / _CONFIG} does not fit the weights beside it\n  " + "\n  ".join(differences))
    return state_dict, names, module, config, file


def _model_folder(folder):
    """The folder itself, or a pipeline's `vae`."""
    return folder / "vae" if not (folder / _CONFIG).exists() and (folder / "vae").is_dir() else folder


def _read_config(folder):
    config = weights.read_config(folder)
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"{Path(folder) / _CONFIG} is of class {config.get('_class_name')!r}; the only VAE known is 'AutoencoderKL'"
        )
    return config


def _diffusers_config(module):
    """Arguments of diffusers' AutoencoderKL that describe the network."""
    if module.channel_multipliers[0] != 1:
        raise ValueError(
            f"channel_multipliers={module.channel_multipliers}: diffusers' first level is as wide as conv_in, multiplier 1"
        )
    levels = range(len(module.channel_multipliers))

    def blocks(name):
        return [f"Attn{name}" if level in module.attention_levels else name for level in levels]

    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": module.latent_channels,
        "block_out_channels": [module.channels * multiplier for multiplier in module.channel_multipliers],
        "layers_per_block": module.num_res_blocks,
        "down_block_types": blocks("DownEncoderBlock2D"),
        "up_block_types": blocks("UpDecoderBlock2D")[::-1],
        "act_fn": "silu",
        "norm_num_groups": module.norm_groups,
        "use_quant_conv": module.quant_convs,
        "use_post_quant_conv": module.quant_convs,
        "mid_block_add_attention": True,
    }


def _sizes(module):
    """The fields that describe the network, in a form that compares."""
    return {
        "latent_channels": module.latent_channels,
        "channels": module.channels,
        "channel_multipliers": tuple(module.channel_multipliers),
        "num_res_blocks": module.num_res_blocks,
        "attention_levels": tuple(sorted(module.attention_levels)),
        "norm_groups": module.norm_groups,
        "quant_convs": module.quant_convs,
    }


def _config_stats(config, source, channels=None):
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise ValueError(f"{source} has only one of latents_mean and latents_std")
    channels = channels or config.get("latent_channels", 4)
    if mean is not None:
        return _stats(source, channels, latents_mean=mean, latents_std=std)
    scale, shift = config.get("scaling_factor", _SCALING), config.get("shift_factor")
    if scale is None:
        return None
    shift = 0.0 if shift is None else shift
    return _stats(source, channels, inverted=True, shift_factor=[shift] * channels, scaling_factor=[scale] * channels)


def _stats(source, channels, inverted=False, **named):
    """{'mean', 'var'} of a named mean and, after it, a named standard deviation (its inverse if `inverted`)."""
    columns = []
    for name, value in named.items():
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {name} is {value!r}, no list of numbers") from error
        if array.size < 1 or array.shape not in ((array.size,), (1, array.size, 1, 1)):
            raise ValueError(f"{source}: {name} has shape {array.shape}; allowed: (C,) or (1, C, 1, 1)")
        if not np.isfinite(array).all():
            raise ValueError(f"{source}: {name} is not finite")
        columns.append(array.reshape(-1))
    (mean_name, scale_name), (mean, scale) = named, columns
    if len(mean) != len(scale) or len(mean) != (channels or len(mean)):
        needed = f"; the VAE has {channels} channels" if channels else ""
        raise ValueError(f"{source}: {mean_name} has {len(mean)} entries, {scale_name} {len(scale)}{needed}")
    if not (scale > 0).all():
        raise ValueError(f"{source}: {scale_name} must be positive; its smallest entry is {scale.min()}")
    with np.errstate(over="ignore", under="ignore"):
        stats = {"mean": mean.astype(np.float32), "var": np.square(1 / scale if inverted else scale).astype(np.float32)}
    if not (np.isfinite(stats["mean"]).all() and np.isfinite(stats["var"]).all() and stats["var"].all()):
        raise ValueError(f"{source}: {mean_name} or {scale_name} is beyond the range of float32 variances")
    return stats


def _mean_and_std(latent_stats, channels):
    """float64 [C] each, checked; the exact root, so that squaring and rounding it to float32 gives `var` again."""
    stats = {name: np.asarray(latent_stats[name], np.float64) for name in ("mean", "var")}
    for name, array in stats.items():
        if array.shape != (channels or array.size,):
            raise ValueError(f"latent statistics: {name} has shape {array.shape}; needed: ({channels or 'C'},)")
        if not np.isfinite(array).all():
            raise ValueError(f"latent statistics: {name} is not finite")
    if not (stats["var"] > 0).all():
        raise ValueError(f"latent statistics: var must be positive; its smallest entry is {stats['var'].min()}")
    return stats["mean"], np.sqrt(stats["var"])
