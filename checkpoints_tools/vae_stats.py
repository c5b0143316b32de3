"""Statistics of a VAE's latents, {'mean', 'var'} of float32 [C] <-> the names and forms that files have for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from checkpoints_tools.mapping import StateDict

Stats = Mapping[str, Float[np.ndarray, " C"]]

_SCALING = 0.18215  # diffusers' default for a config.json without scaling_factor, such as sd-vae-ft-mse's


def from_arrays(arrays: StateDict, source: str | Path, channels: int | None = None) -> dict[str, np.ndarray]:
    """Returns the statistics in a file's arrays; `channels` is C, if known. ValueError if they cannot be statistics.

    They are REPA-E's latents_scale (1 / std) and latents_bias (mean), or LightningDiT's mean and std; [1, C, 1, 1] or [C].
    """
    for names in (("latents_bias", "latents_scale"), ("mean", "std")):
        if set(arrays) == set(names):
            return _stats(source, channels, {name: arrays[name] for name in names}, inverse="latents_scale" in arrays)
    advice = "latent statistics are latents_scale and latents_bias, or mean and std"
    raise ValueError(f"{source} holds {', '.join(sorted(arrays)[:8]) or 'nothing'}; {advice}")


def from_config(config: Mapping[str, Any], source: str | Path, channels: int | None = None) -> dict[str, np.ndarray] | None:
    """Returns the statistics in diffusers' config.json, None if it has a scaling_factor of null and nothing else."""
    named = {name: config.get(name) for name in ("latents_mean", "latents_std")}
    absent = [name for name, value in named.items() if value is None]
    if len(absent) == 1:
        raise ValueError(f"{source} has only one of latents_mean and latents_std")
    channels = channels or config.get("latent_channels", 4)
    if not absent:
        return _stats(source, channels, named)
    scale, shift = config.get("scaling_factor", _SCALING), config.get("shift_factor")
    if scale is None:
        return None
    shift = 0.0 if shift is None else shift
    return _stats(source, channels, {"shift_factor": [shift] * channels, "scaling_factor": [scale] * channels}, inverse=True)


def to_config(latent_stats: Stats, channels: int) -> dict[str, Any]:
    """Returns the entries of diffusers' config.json for the statistics.

    `latents_mean` and `latents_std` beside a `scaling_factor` of 1, for diffusers' pipelines multiply by both; `shift_factor`
    and `scaling_factor` alone if all channels have the same.
    """
    mean, std = _mean_and_std(latent_stats, channels)
    if np.ptp(mean) == np.ptp(std) == 0:
        return {"shift_factor": float(mean[0]), "scaling_factor": float(1 / std[0])}
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 1.0}


def to_arrays(latent_stats: Stats, channels: int | None = None) -> dict[str, Float[np.ndarray, "1 C 1 1"]]:
    """Returns the content of a published -latents-stats file, float32; ValueError if they cannot be statistics."""
    mean, std = _mean_and_std(latent_stats, channels)
    arrays = {"latents_scale": 1 / std, "latents_bias": mean}
    return {name: array.astype(np.float32).reshape(1, -1, 1, 1) for name, array in arrays.items()}


def _stats(source, channels, named, inverse=False):
    """{'mean', 'var'} of a named mean and, after it, a named standard deviation, or its inverse."""
    mean, scale = _checked(source, channels, named)
    with np.errstate(over="ignore", under="ignore"):
        stats = {"mean": mean.astype(np.float32), "var": np.square(1 / scale if inverse else scale).astype(np.float32)}
    if not (np.isfinite(stats["mean"]).all() and np.isfinite(stats["var"]).all() and stats["var"].all()):
        raise ValueError(f"{source}: {' or '.join(named)} is beyond the range of float32 variances")
    return stats


def _mean_and_std(latent_stats, channels):
    """Both as float64 [C]; the exact root, so that squaring and rounding it to float32 gives `var` again."""
    mean, var = _checked("latent statistics", channels, {name: latent_stats[name] for name in ("mean", "var")})
    return mean, np.sqrt(var)


def _checked(source, channels, named):
    """A named mean and, after it, a named measure of spread, as float64 [C]."""
    (mean_name, mean), (scale_name, scale) = ((name, _vector(source, name, value)) for name, value in named.items())
    if len(mean) != len(scale) or len(mean) != (channels or len(mean)):
        needed = f"; the VAE has {channels} channels" if channels else ""
        raise ValueError(f"{source}: {mean_name} has {len(mean)} entries, {scale_name} {len(scale)}{needed}")
    if not (scale > 0).all():
        raise ValueError(f"{source}: {scale_name} must be positive; its smallest entry is {scale.min()}")
    return mean, scale


def _vector(source, name, value):
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {name} is {value!r}, no list of numbers") from error
    if array.size < 1 or array.shape not in ((array.size,), (1, array.size, 1, 1)):
        raise ValueError(f"{source}: {name} has shape {array.shape}; allowed: (C,) or (1, C, 1, 1)")
    if not np.isfinite(array).all():
        raise ValueError(f"{source}: {name} is not finite")
    return array.reshape(-1)
