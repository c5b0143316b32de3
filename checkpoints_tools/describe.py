"""Descriptions of files and folders for `inspect`: layout, sizes, parameter counts, statistics."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from checkpoints_tools import mapping, sit, vae, vae_layouts, vae_stats, vit
from checkpoints_tools.identify import KINDS, Identified, naming
from repae_jax.training import checkpoint


def describe(source: Identified) -> dict[str, Any]:
    """Describes a file or folder in nested dicts of plain values."""
    about = {"path": str(source.path), "kind": KINDS[source.kind]}
    if source.path.is_file():
        about["bytes"] = source.path.stat().st_size
    with naming(source.path):
        match source.kind:
            case "run":
                return about | _run(source.path)
            case "training":
                return about | _training(source.checkpoint)
            case "encoder" | "mocov3":
                return about | _encoder(source)
            case "vae":
                return about | _vae(source)
            case _:
                return about | _network(source.kind, source.arrays, str(source.path))


def _run(workdir):
    config = checkpoint.read_config(workdir)
    shapes, step = checkpoint.stored_shapes(workdir)
    about = {"step": step, "steps_saved": checkpoint.saved_steps(workdir), "job": config["job"]}
    if "diffusion" in config:
        diffusion = config["diffusion"]
        about["objective"] = diffusion.get("mean_flow") or diffusion["path"]
        if diffusion.get("predicts") == "data":
            about["objective"] += ", predicts data"
    about["encoders"] = {name: fields["weights"] for name, fields in config.get("encoders", {}).items()}
    for name in ("sit", "vae", "disc"):
        params = jax.tree.leaves((shapes.get(name) or {}).get("params", {}))
        about[name] = {**config[name], "parameters": sum(math.prod(leaf.shape) for leaf in params)} if params else None
    if fingerprint := checkpoint.read_data_state(workdir).get("inputs", {}).get("frozen_vae"):
        about["vae"] = {**config["vae"], "frozen": config["init"]["vae"], "fingerprint": fingerprint}
    return about


def _training(training):
    about = {"steps": training.steps}
    for name, arrays in training.networks.items():
        kind = "sit" if name in ("model", "ema") else name
        numbers = map(training.number, ("encoder_depth", "num_heads", "norm_groups"))
        about[name] = _network(kind, arrays, f"{training.source}: {name}", *numbers)
    for name, adam in training.optimizers.items():
        about[name] = {"optimizer": "AdamW", "updates": adam.steps, "arrays": len(adam.exp_avg)}
    return about | {"args": dict(training.args)}


def _encoder(source):
    stored = vit.read_file(source.path, source.arrays)
    names = [name for name in stored.module.__dataclass_fields__ if name not in ("parent", "name", "dtype")]
    return {name: getattr(stored.module, name) for name in names} | weight_statistics(mapping.flatten(stored.params))


def _vae(source):
    loaded = vae.read_file(source.path, source.arrays)
    about = {"layout": loaded.layout, **_vae_sizes(loaded.module), **weight_statistics(mapping.flatten(loaded.params))}
    return about if loaded.latent_stats is None else about | _latent_statistics(loaded.latent_stats)


def _network(kind, arrays, source, encoder_depth=None, num_heads=None, norm_groups=None):
    about = {}
    if kind == "sit":
        about = {"layout": sit.layout_of(arrays), "grid": sit.grid_of(arrays)}
        about |= sit.describe_sit(arrays, encoder_depth, num_heads)
        if "bn.running_mean" in arrays:
            about |= _latent_statistics({"mean": arrays["bn.running_mean"], "var": arrays["bn.running_var"]})
    elif kind == "vae":
        names, arrays = vae_layouts.detect_layout(arrays, source)
        module = vae_layouts.infer_module(arrays, names, source, norm_groups or vae_layouts.NORM_GROUPS)
        about = {"layout": names.layout, **_vae_sizes(module)}
    elif kind == "latent_stats":
        return _latent_statistics(vae_stats.from_arrays(arrays, source))
    return about | weight_statistics(arrays or {})


def _vae_sizes(module):
    return {"factor": module.factor, **vae.vae_sizes(module), "feature_dim": module.feature_dim}


def _latent_statistics(stats):
    return {"latent_mean": np.asarray(stats["mean"]).tolist(), "latent_std": np.sqrt(stats["var"]).tolist()}


def weight_statistics(arrays: mapping.StateDict) -> dict[str, Any]:
    """Counts and spread of a network's weights, without its counters."""
    floats = {name: array for name, array in arrays.items() if array.dtype in mapping.WEIGHT_DTYPES}
    count = sum(array.size for array in floats.values())
    # array by array: nothing as large as the file is made
    squares = {name: float(np.square(array, dtype=np.float64).sum()) for name, array in floats.items()}
    bad = [name for name, total in squares.items() if not np.isfinite(total)]
    about = {
        "arrays": len(arrays), "parameters": count, "dtypes": sorted({array.dtype.name for array in floats.values()}),
        "rms": math.sqrt(sum(total for name, total in squares.items() if name not in bad) / max(count, 1)),
    }
    return about | ({"not_finite": bad} if bad else {})


def text(about: Mapping[str, Any], indent: str = "") -> str:
    """Formats nested dicts as lines 'name: value', long lists and numbers shortened."""
    lines = []
    for name, value in about.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {_value_text(value)}")
    return "\n".join(lines)


def _value_text(value):
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        items = [_value_text(item) for item in value[:8]] + (["…"] if len(value) > 8 else [])
        return f"[{', '.join(items)}]"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
