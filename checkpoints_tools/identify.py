"""What is this file? Its kind from the names in it, and everything worth knowing about it."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints_tools import locate, mapping, published, vae, vit, weights
from checkpoints_tools.sit import describe_sit, grid_of, layout_of
from checkpoints_tools.vae_layouts import detect_layout, infer_module
from repae_jax.training import checkpoint

# kind -> a beginning of a name that only its files have; the first that fits decides
_SIGNS = {
    "mocov3": ("base_encoder.",),
    "vae": ("decoder.conv_in.", "decoder.conv_out.", "first_stage_model."),
    "sit": ("x_embedder.proj.",),
    "discriminator": ("main.0.",),
    "lpips": ("lin0.", "net.slice1."),
    "vgg16": ("features.0.",),
    "inception": ("Conv2d_1a_3x3.",),
}
KINDS = {
    "run": "workdir of a training run",
    "training": "published training checkpoint",
    "sit": "SiT, REPA or DiT weights",
    "vae": "AutoencoderKL",
    "discriminator": "PatchGAN discriminator",
    "latent_stats": "latent statistics",
    "encoder": "vision encoder (Hugging Face folder)",
    "mocov3": "vision encoder (MoCo v3)",
    "lpips": "LPIPS linear weights or module",
    "vgg16": "torchvision's VGG16",
    "inception": "FID Inception",
}


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A file or folder, recognised.

    Attributes:
      path: local path: the file with the weights, or the folder of an encoder or run; an epath.Path of a remote run.
      kind: key of KINDS.
      arrays: its state dict; empty for a run, a training checkpoint, an encoder and a VAE, which have readers of their own.
      checkpoint: TrainingCheckpoint, of such.
    """

    path: Path
    kind: str
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    checkpoint: published.TrainingCheckpoint | None = None


def identify(path, step=None):
    """Recognises a file or folder by its content.

    Args:
      path: what `locate.resolve` takes.
      step: which checkpoint of a published run to take; default the newest. Of a run of ours, the reader chooses.

    Returns:
      Artefact.

    Raises:
      FileNotFoundError: if there is no such thing.
      ValueError: if it cannot be read, is none of KINDS, or has no steps to choose from.
    """
    path = locate.resolve(path)
    with _naming(path):
        artefact = _identify(path, step)
        if step is not None and artefact.kind not in ("run", "training"):
            raise ValueError(f"{path} is a {KINDS[artefact.kind]}, which has no step {step} to choose")
        return artefact


@contextlib.contextmanager
def _naming(path):
    """Whatever reading damaged content raises becomes a ValueError that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not what it looks like, or it is damaged: {reason}") from error


def _identify(path, step):
    if path.is_dir():
        if (path / "args.json").exists():
            file = published.find(path, step)
            return Artefact(file, "training", checkpoint=published.read(file))
        if (path / "checkpoints").is_dir():
            return Artefact(path, "run")
        if "model_type" in (weights.read_config(path) if (path / "config.json").exists() else {}):
            return Artefact(path, "encoder")
        if not (path / "config.json").exists() and (path / "vae").is_dir():
            path = path / "vae"  # a whole diffusers pipeline
    if path.suffix == ".pb":
        return Artefact(path, "inception")
    file = weights.weight_file(path)
    if file.suffix in weights.TORCH_SUFFIXES:
        content = weights.read_torch(file)
        if published.is_training_checkpoint(content):
            published.find(file, step)  # one file has no steps to choose from
            return Artefact(file, "training", checkpoint=published.from_torch(content, file))
        arrays = weights.unwrap(content, None, file)
    elif file.suffix == ".safetensors" and published.METADATA in weights.read_metadata(file):
        return Artefact(file, "training", checkpoint=published.read(file, step))
    else:
        arrays = weights.read_state_dict(file)
    if set(arrays) in ({"latents_scale", "latents_bias"}, {"mean", "std"}):
        return Artefact(file, "latent_stats", arrays)
    for kind, beginnings in _SIGNS.items():
        if any(name.startswith(beginnings) for name in arrays):
            return Artefact(path if path.is_dir() else file, kind, {} if kind in ("vae", "mocov3") else arrays)
    raise ValueError(f"{file} is nothing known here; it holds {', '.join(sorted(arrays)[:6])} …; known are {', '.join(KINDS)}")


def describe(artefact):
    """What an Artefact is, as nested dicts of plain values: layout, sizes, parameter counts, statistics.

    Raises:
      ValueError: if it is damaged, or its sizes cannot be told from its names and shapes.
    """
    with _naming(artefact.path):
        return _describe(artefact)


def _describe(artefact):
    about: dict[str, Any] = {"path": str(artefact.path), "kind": KINDS[artefact.kind]}
    if artefact.path.is_file():
        about["bytes"] = artefact.path.stat().st_size
    if artefact.kind == "run":
        config = checkpoint.read_config(artefact.path)
        shapes, step = checkpoint.stored_shapes(artefact.path)
        about |= {"step": step, "steps_saved": checkpoint.saved_steps(artefact.path), "job": config["job"]}
        if "diffusion" in config:
            about["objective"] = config["diffusion"]["path"]
        about["encoders"] = {name: fields["weights"] for name, fields in config.get("encoders", {}).items()}
        for name in ("sit", "vae", "disc"):
            params = jax.tree.leaves((shapes.get(name) or {}).get("params", {}))
            about[name] = {**config[name], "parameters": sum(math.prod(leaf.shape) for leaf in params)} if params else None
        if fingerprint := checkpoint.read_data_state(artefact.path).get("inputs", {}).get("frozen_vae"):
            about["vae"] = {**config["vae"], "frozen": config["init"]["vae"], "fingerprint": fingerprint}
    elif artefact.kind == "training":
        taken = artefact.checkpoint
        about["steps"] = taken.steps
        for name, arrays in taken.networks.items():
            kind = "sit" if name in ("model", "ema") else name
            about[name] = _describe_arrays(
                kind, arrays, f"{artefact.path}: {name}", taken.encoder_depth, taken.num_heads, taken.norm_groups
            )
        for name, adam in taken.optimizers.items():
            about[name] = {"optimizer": "AdamW", "updates": adam.steps, "arrays": len(adam.exp_avg)}
        about["args"] = dict(taken.args)
    elif artefact.kind in ("encoder", "mocov3"):
        about |= _describe_encoder(artefact)
    elif artefact.kind == "vae":
        loaded = vae.load_vae(artefact.path)
        about |= {"layout": loaded.layout, **_vae_sizes(loaded.module), **_statistics(mapping.flatten(loaded.params))}
        if loaded.latent_stats is not None:
            about |= _latent_statistics(loaded.latent_stats)
    else:
        about |= _describe_arrays(artefact.kind, artefact.arrays, str(artefact.path))
    return about


def _describe_encoder(artefact):
    module, params = vit.read_encoder(artefact.path)
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__ if name not in ("parent", "name", "dtype")}
    return {**fields, **_statistics(mapping.flatten(params))}


def _describe_arrays(kind, arrays, source, encoder_depth=None, num_heads=None, norm_groups=32):
    about = {}
    if kind == "sit":
        fields = describe_sit(arrays, encoder_depth, num_heads)
        about = {"layout": layout_of(arrays), "grid": grid_of(arrays), **fields}
        if "bn.running_mean" in arrays:
            about |= _latent_statistics({"mean": arrays["bn.running_mean"], "var": arrays["bn.running_var"]})
    elif kind == "vae":
        names, arrays = detect_layout(arrays, source)
        about = {"layout": names.layout, **_vae_sizes(infer_module(arrays, names, source, norm_groups))}
    elif kind == "latent_stats":
        return _latent_statistics(vae.latent_stats_from_arrays(arrays, source))
    return about | _statistics(arrays)


def _vae_sizes(module):
    sizes = (
        "factor", "latent_channels", "channels", "channel_multipliers", "num_res_blocks", "attention_levels", "norm_groups",
        "quant_convs", "feature_dim",
    )  # fmt: skip
    return {name: getattr(module, name) for name in sizes}


def _latent_statistics(stats):
    return {"latent_mean": np.asarray(stats["mean"]).tolist(), "latent_std": np.sqrt(stats["var"]).tolist()}


def _statistics(arrays):
    """Counts and spread of a network's weights; its counters aside."""
    floats = {name: array for name, array in arrays.items() if array.dtype in mapping.WEIGHT_DTYPES}
    count = sum(array.size for array in floats.values())
    # array by array: nothing as large as the file is made
    squares = {name: float(np.square(array, dtype=np.float64).sum()) for name, array in floats.items()}
    finite = {name: bool(np.isfinite(total)) for name, total in squares.items()}
    about = {
        "arrays": len(arrays),
        "parameters": count,
        "dtypes": sorted({array.dtype.name for array in floats.values()}),
        "rms": math.sqrt(sum(total for name, total in squares.items() if finite[name]) / max(count, 1)),
    }
    bad = [name for name in squares if not finite[name]]
    return about | ({"not_finite": bad} if bad else {})


def text(about, indent=""):
    """Nested dicts as lines 'name: value', long lists and numbers shortened."""

    def shown(value):
        if isinstance(value, float):
            return f"{value:.5g}"
        if isinstance(value, list | tuple):
            cut = [shown(item) for item in value[:8]] + (["…"] if len(value) > 8 else [])
            return f"[{', '.join(cut)}]"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    lines = []
    for name, value in about.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {shown(value)}")
    return "\n".join(lines)
