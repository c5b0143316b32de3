"""Plain SiT, whose t = 0 is noise and which has unused sigma outputs -> the same network as ours and REPA-E's."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools import sit, torch_param_order, weights
from checkpoints_tools.mapping import Tree
from repae_jax.models.sit import SiT

SD_VAE_STD = 1 / 0.18215  # plain SiT, REPA and DiT were trained on latents of this std; their mean is assumed to be 0


def convert_plain_sit(path: Path) -> dict[str, np.ndarray]:
    """Returns a plain SiT's file as a state dict of REPA-E's layout, with the statistics of SD-VAE's latents."""
    loaded = sit.from_state_dict(weights.read_file(path, weights.AVERAGED), str(path))
    if loaded.layout != "sit-or-dit":
        raise ValueError(f"{path} is of layout {loaded.layout!r}, not a plain SiT: leave plain_sit out")
    module, params = without_sigma(loaded.module, reverse_time(loaded.variables["params"]))
    ones = np.ones(module.latent_channels, np.float32)
    variables = {"params": params, "latent_stats": {"mean": 0 * ones, "var": np.float32(SD_VAE_STD**2) * ones}}
    return torch_param_order.to_ordered_torch(sit.sit_table(module), variables)


def reverse_time(params: Tree) -> dict[str, Any]:
    """Parameters of the same SiT with time running the other way: v'(z, t) = -v(z, 1 - t). Its own inverse.

    Plain SiT calls noise t = 0 and data t = 1; we, like REPA and REPA-E, the other way round. The first layer of the time
    embedder sees cos(f t) and sin(f t), of which cos(f (1 - t)) and sin(f (1 - t)) are linear combinations, so the change of
    time is a change of that layer's weights. For velocities only, t in [0, 1]: DiT's noise prediction has no such symmetry.
    Unchanged leaves are shared with `params`.
    """
    embedder, final = params["t_embedder"], params["final_layer"]
    kernel = np.asarray(embedder["fc1"]["kernel"])
    half = kernel.shape[0] // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / half)[:, None]  # as in layers.timestep_embedding, in float64
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    cos_rows, sin_rows = kernel[:half].astype(np.float64), kernel[half:].astype(np.float64)
    reversed_kernel = np.concatenate([cos * cos_rows + sin * sin_rows, sin * cos_rows - cos * sin_rows]).astype(kernel.dtype)
    return {
        **params,
        "t_embedder": {**embedder, "fc1": {**embedder["fc1"], "kernel": reversed_kernel}},
        "final_layer": {**final, "linear": {name: -np.asarray(leaf) for name, leaf in final["linear"].items()}},
    }


def without_sigma(module: SiT, params: Tree) -> tuple[SiT, Tree]:
    """Returns the same velocity network and its parameters without the unused sigma outputs."""
    if not module.learned_sigma:
        return module, params
    patch, channels = module.patch_size, module.latent_channels

    def velocity_half(leaf):  # outputs are (row, column, channel) within a patch, sigma's channels after the velocity's
        leaf = np.asarray(leaf)
        return leaf.reshape(*leaf.shape[:-1], patch**2, 2 * channels)[..., :channels].reshape(*leaf.shape[:-1], -1)

    final = params["final_layer"]
    linear = {name: velocity_half(leaf) for name, leaf in final["linear"].items()}
    return module.clone(learned_sigma=False), {**params, "final_layer": {**final, "linear": linear}}
